"""Whether a directory or a checkpoint belongs to the run that a configuration describes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.schema import ConfigError, RunConfig, config_as_dict, load_config, shown
from training.run_directory import NO_RUN

MAY_CHANGE = {"model.impl", "data.prefetch"}
"""What of model and data a run may be continued with another value of: neither changes what is computed."""


def refuse_other_run(config: RunConfig, tokenizer: Path | None) -> None:
    """Raises ConfigError if the run directory of `config` holds a run with another model, other data or another
    tokenizer, or something that is no run."""
    directory = config.directory
    if not (directory / "config.yaml").exists():
        if directory.exists() and any(path.name not in NO_RUN for path in directory.iterdir()):
            raise ConfigError(f"{directory}: holds files but no config.yaml, so it is no run; choose another name")
        return
    here, there = config_as_dict(config), config_as_dict(load_config(directory / "config.yaml"))
    for key in ("model", "data", "train.seed"):
        _refuse_differences(key, _at(here, key), _at(there, key), f"{directory} holds a run")
    _refuse_other_tokenizer(tokenizer, directory)


def refuse_other_model(config: RunConfig, checkpoint: Path, model: dict[str, Any], tokenizer: Path | None) -> None:
    """Raises ConfigError if `checkpoint`, which says that it holds `model`, is of another one or another tokenizer."""
    _refuse_differences("model", config_as_dict(config)["model"], model, f"{checkpoint} holds a model")
    _refuse_other_tokenizer(tokenizer, checkpoint)


def _refuse_differences(room: str, mine: Any, other: Any, holder: str) -> None:
    for key, value, held in _differences(room, mine, other):
        raise ConfigError(
            f"{key}: {shown(value)}, but {holder} with {shown(held)}; set the value back to continue that "
            "one, or choose another name for this"
        )


def _refuse_other_tokenizer(tokenizer: Path | None, directory: Path) -> None:
    held = directory / "tokenizer.model"
    same = held.read_bytes() == tokenizer.read_bytes() if tokenizer is not None and held.exists() else True
    if not same or held.exists() != (tokenizer is not None):
        raise ConfigError(
            f"data: its tokenizer is {tokenizer}, but {directory} was made with another; prepare the corpus with "
            f"{held if held.exists() else 'none'}, or choose another name for this run"
        )


def _differences(key: str, mine: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    if key in MAY_CHANGE:
        return
    if isinstance(mine, dict) and isinstance(other, dict):
        for inner in sorted(mine.keys() | other.keys()):
            yield from _differences(f"{key}.{inner}", mine.get(inner), other.get(inner))
    elif mine != other:
        yield key, mine, other


def _at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values
