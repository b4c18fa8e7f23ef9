"""One YAML is one complete run: reading, overriding, checking and writing it.

The rooms declare their settings as frozen dataclasses; pydantic checks the YAML against them, strictly: a number in
quotes is not a number, an unknown key is an error, and every error names key, value, requirement and way out.
"""

import copy
import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from data.config import DataConfig
from models.config import ModelConfig
from parallel.config import ParallelConfig
from training.config import CheckpointConfig, EvalConfig, LogConfig, OptimizerConfig, TrainConfig
from training.health import HealthConfig


class ConfigError(ValueError):
    """The run cannot start as it is described."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A complete run. `name` is its directory below `log.directory`."""

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    health: HealthConfig = field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name or self.name == "..":
            raise ValueError(f"name: {self.name!r}; must be a single directory name")
        warmup, decay = self.optimizer.schedule.warmup_steps, self.optimizer.schedule.decay_steps or 0
        if warmup + decay > self.train.steps:
            raise ValueError(
                f"optimizer.schedule: {warmup} warm-up and {decay} decay steps exceed train.steps "
                f"({self.train.steps}); shorten them or train longer"
            )
        if self.train.batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.batch_size: {self.train.batch_size}; must be a multiple of micro_batch_size "
                f"({self.train.micro_batch_size}) times the data-parallel ranks"
            )
        prompts_without_time = self.eval.prompts and self.eval.every is None
        if prompts_without_time:
            raise ValueError("eval.prompts: given, but eval.every is null, so they are never continued; set eval.every")

    @property
    def directory(self) -> Path:
        """Where the run lives."""
        return Path(self.log.directory) / self.name


RunConfig.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # type: ignore[attr-defined]
_RUN: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes, with `key.sub=value` overrides applied in order.

    Raises:
        ConfigError: listing everything that is wrong, a line each.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); name a run's YAML, for example configs/demo.yaml"
        ) from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {shown(values)}; a run is a mapping with model, data, train, optimizer")
    for override in overrides:
        _apply(values, override)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> RunConfig:
    """The run that nested plain values describe. Raises ConfigError."""
    values = copy.deepcopy(values)
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("layers"), dict):
        model["layers"] = _expand_layers(model["layers"])
    try:
        return _RUN.validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


def dump_config(config: RunConfig) -> str:
    """The complete run as YAML, defaults included; `load_config` reads it back to an equal run."""
    stream = StringIO()
    YAML(typ="safe", pure=True).dump(config_as_dict(config), stream)
    return stream.getvalue()


def config_as_dict(config: RunConfig) -> dict[str, Any]:
    """The complete run as nested plain values."""
    return json.loads(_RUN.dump_json(config))


def shown(value: Any, limit: int = 60) -> str:
    """A value as an error message quotes it."""
    text = json.dumps(value, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{where}:{line} {problem}; correct the YAML") from None


def _apply(values: Any, override: str) -> None:
    """Sets one `key.sub=value`; the value is YAML, and an entry of a list is named by its index, counted from 0.

    Whether the key exists is checked with the whole.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override}: an override has the form key.sub=value, for example train.steps=100")
    *parents, last = key.split(".")
    for name, parent in zip(["the run", *parents], [*parents, None], strict=True):
        if isinstance(values, list):
            index = parent if parent is not None else last
            if not index.isdecimal() or int(index) >= len(values):
                raise ConfigError(f"{override}: {name} is a list of {len(values)}; name one of its entries by index")
        elif not isinstance(values, dict):
            raise ConfigError(f"{override}: {name} is no mapping; override it as a whole")
        if parent is not None:
            values = values[int(parent)] if isinstance(values, list) else values.setdefault(parent, {})
    values[int(last) if isinstance(values, list) else last] = _parse_yaml(text, override)


def _expand_layers(layers: dict[str, Any]) -> Any:
    """`{pattern: [a, a, b], repeat: 2}` as the plain list it stands for."""
    pattern, repeat = layers.get("pattern"), layers.get("repeat")
    if set(layers) != {"pattern", "repeat"} or not isinstance(pattern, list) or not isinstance(repeat, int):
        raise ConfigError(
            f"model.layers: {shown(layers)}; either a list of mixers, or {{pattern: [mixer, ...], repeat: number}}"
        )
    return pattern * repeat


def _explain(error: Any) -> str:
    """One line for one of pydantic's errors."""
    location, kind, value = error["loc"], error["type"], error["input"]
    key = ".".join(str(part) for part in location)
    if kind == "unexpected_keyword_argument":
        known = _keys_at(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{key}: {shown(value)}; there is no such key; {hint}"
    if kind == "missing":
        return f"{key}: missing; it has no default, so the YAML must set it"
    if kind == "value_error":
        return f"{key}.{error['ctx']['error']}" if key else str(error["ctx"]["error"])
    requirement = error["msg"].removeprefix("Input should be ")
    return f"{key}: {shown(value)}; must be {requirement}; correct it in the YAML or pass {key}=..."


def _keys_at(location: Sequence[str | int]) -> list[str]:
    """The keys that the mapping at `location` may have."""
    cls: Any = RunConfig
    for part in location:
        if isinstance(part, str):
            cls = get_type_hints(cls)[part]
        candidates = [cls, *get_args(cls)]
        cls = next((c for c in candidates if dataclasses.is_dataclass(c)), cls)
    return [f.name for f in dataclasses.fields(cls)]
