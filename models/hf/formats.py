"""What a Hugging Face class must state so that models of it can be exported, verified and imported.

A `Format` is data and pure functions; `models/hf/registry.py` lists them all.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from models.config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]
"""Of parameters, by name."""


class TokenIds(NamedTuple):
    """The tokenizer's special tokens, as configurations name them."""

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a directory, made of one parameter of `LM`: `source[start:stop].reshape(shape)`.

    Attributes:
        name: in the directory.
        source: the parameter's name in `LM.named_parameters()`.
        shape: in the directory.
        rows: (start, stop) of the parameter's first dimension; None for all of it. The parts of a parameter follow each
            other and cover it, so that `models/hf/weights.py` can put it together again.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None

    def cut(self, parameter: Tensor) -> Tensor:
        """The stored tensor, in memory of its own where it is a part."""
        part = parameter if self.rows is None else parameter[slice(*self.rows)].clone()
        return part.reshape(self.shape)


Layout = Callable[[ModelConfig, Shapes], list[Stored]]
"""The tensors of a directory, for a model and the shapes of its parameters."""


@dataclass(frozen=True)
class Loaded:
    """A directory read back by code that is not `models/lm.py`.

    Attributes:
        logits: `[B, T]` token ids, no padding -> `[B, T, N]`, fp32, every row a document of its own.
        generate: (prompt `[1, T]`, number of tokens) -> `[1, T + number]` greedily through the class's cache; None
            where the class cannot run on this machine.
        how: what was run, a sentence for the model card.
    """

    logits: Callable[[Tensor], Tensor]
    generate: Callable[[Tensor, int], Tensor] | None
    how: str


@dataclass(frozen=True, kw_only=True)
class Format:
    """
    Attributes:
        name: as `--format` takes it.
        model_type: `config.json`'s, by which an import finds the format.
        architecture: the class, by name.
        library: what a user must have installed to load it, for the card.
        fits: what keeps a model from being stored so: a line a key with its value, the requirement and a way out; none
            where it fits.
        config_json: `config.json` of a model that fits, as plain values, `architectures` included, `dtype` not.
        tensors: every tensor of the directory; `shapes` are those of `LM.named_parameters()`. A tied head is not among
            them.
        layouts: other ways, besides `tensors`, in which directories of the class name and cut their tensors; read,
            never written.
        unused: ends of the names of tensors that earlier versions of the class stored and computed nothing with; an
            import leaves them out.
        model_config: the inverse of `config_json`, of a `config.json` that others wrote, its defaults included. None
            where such directories are not imported. Raises ValueError, naming key, value and way out, where Rondo has
            no such model.
        load_for_check: reads a finished directory back in fp32.
        write_files: what the class needs besides weights, configuration and tokenizer, such as modelling files.
        notes: what a user has to mind, lines for the card.
        snippet: keyword arguments of `from_pretrained` that the card's example needs, for example
            `trust_remote_code=True`.
    """

    name: str
    model_type: str
    architecture: str
    library: str
    fits: Callable[[ModelConfig], list[str]]
    config_json: Callable[[ModelConfig, TokenIds], dict[str, Any]]
    tensors: Layout
    model_config: Callable[[Mapping[str, Any]], ModelConfig] | None
    load_for_check: Callable[[Path], Loaded]
    layouts: tuple[Layout, ...] = ()
    unused: tuple[str, ...] = ()
    write_files: Callable[[ModelConfig, Path], None] | None = None
    notes: tuple[str, ...] = ()
    snippet: str = ""


KEPT_IN_FP32 = ("decay_param", "A_log", "dt_bias", "lower_bounds", "mixer.recurrent", "mixer.peephole")
"""Ends of the names of parameters that no `--dtype` rounds: rates of decay and recurrent weights, whose errors grow
with the length of what is remembered."""


def stays_fp32(name: str) -> bool:
    """Whether a parameter of `LM` is stored in fp32 whatever the rest is stored in."""
    return name.endswith(KEPT_IN_FP32)


Requirement = tuple[str, Any, bool, str]
"""A key of the run, its value, whether the class has such a model, and what it requires."""


def obstacles(architecture: str, requirements: Iterable[Requirement]) -> list[str]:
    """`Format.fits`: a line for each requirement that is not met."""
    return [
        f"{key}: {shown(value)}; {architecture} needs {requirement}"
        for key, value, fits, requirement in requirements
        if not fits
    ]


def shown(value: Any) -> Any:
    """A value as a run's YAML writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return ", ".join(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class Names:
    """How a class calls what `LM` calls otherwise, by the beginnings of names.

    Attributes:
        outer: parameters outside the blocks, whole names.
        blocks: for each kind of layer, what follows `blocks.<i>.` here and `model.layers.<i>.` there; the longest
            beginning that fits counts.
    """

    outer: Mapping[str, str]
    blocks: Mapping[str, Mapping[str, str]]

    def of(self, name: str, layers: tuple[str, ...]) -> str:
        """Raises KeyError where the class has no such parameter."""
        if not name.startswith("blocks."):
            return self.outer[name]
        _, index, rest = name.split(".", 2)
        table = self.blocks[layers[int(index)]]
        ours = max((beginning for beginning in table if rest.startswith(beginning)), key=len, default=None)
        if ours is None:
            raise KeyError(name)
        return f"model.layers.{index}.{table[ours]}{rest.removeprefix(ours)}"

    def tensors(self, config: ModelConfig, shapes: Shapes) -> list[Stored]:
        """Every parameter whole under its other name; taps `[D, W]` of convolutions as `[D, 1, W]`."""
        return [
            Stored(
                name=self.of(name, config.layers),
                source=name,
                shape=(shape[0], 1, *shape[1:]) if name.endswith("conv.weight") else tuple(shape),
            )
            for name, shape in shapes.items()
        ]
