"""Models that others stored as a Hugging Face class, as Rondo's own: a model in memory, or a checkpoint to train on.

Nothing of the directory is ever run: configuration is JSON, weights are safetensors, modelling files are not opened.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from models.assemble import assemble
from models.checkpoint import TOKENIZER
from models.config import ModelConfig
from models.hf.formats import Format, Shapes, Stored
from models.hf.registry import FORMATS, by_model_type
from models.hf.run_yaml import run_yaml
from models.hf.verify import Agreement, Rows, compare, expected, longest_window, rows_to_compare
from models.hf.weights import Weights, open_weights, parameter_shapes
from models.lm import LM
from models.write_checkpoint import write_checkpoint

HEAD = "lm_head.weight"
"""What all classes call the matrix that may be the embedding."""

READABLE = ("F32", "BF16", "F16")
"""Stored dtypes whose every value is one of fp32."""


@dataclass(frozen=True)
class Directory:
    """A Hugging Face directory whose every tensor is accounted for.

    Attributes:
        shapes: of the parameters that `config`'s model has.
        tensors: what the directory holds of them.
        left_out: names of what it holds besides, of no meaning to its class (`Format.unused`).
        values: what `config.json` says.
    """

    path: Path
    stored_as: Format
    config: ModelConfig
    shapes: Shapes
    tensors: Sequence[Stored]
    left_out: Sequence[str]
    weights: Weights
    values: Mapping[str, Any]

    @cached_property
    def _parts(self) -> dict[str, list[Stored]]:
        parts: dict[str, list[Stored]] = {}
        for tensor in self.tensors:
            parts.setdefault(tensor.source, []).append(tensor)
        return parts

    def read(self, name: str) -> Tensor:
        """A parameter of `LM` by its name, fp32."""
        parts = sorted(self._parts[name], key=lambda part: part.rows or (0, 0))
        tensors = [self.weights.read(part.name).to(torch.float32).reshape(-1) for part in parts]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return whole.reshape(self.shapes[name])


def open_directory(path: Path) -> Directory:
    """
    Raises:
        ValueError: it is no directory of a class that Rondo knows, or one whose settings it has no model for, or its
            weights are not those of its configuration: each missing, extra or misshapen one is named.
    """
    values = _read_json(path / "config.json")
    stored_as = _format_of(path, values)
    assert stored_as.model_config is not None
    try:
        config = stored_as.model_config(values)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from error
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path / 'config.json'}: is no {stored_as.architecture}'s ({error!r}); fetch it again"
        ) from error
    weights = open_weights(path)
    shapes = parameter_shapes(config)
    layouts = [layout(config, shapes) for layout in (stored_as.tensors, *stored_as.layouts)]
    tensors = min(layouts, key=lambda tensors: _distance(tensors, weights))
    left_out = _match(path, stored_as, config, tensors, weights)
    return Directory(path, stored_as, config, shapes, tensors, left_out, weights, values)


def load_directory(path: Path) -> LM:
    """The model of a Hugging Face directory, in fp32 on the CPU. Raises ValueError as `open_directory` does."""
    directory = open_directory(path)
    return assemble(directory.config, directory.read)


def open_tokenizer(directory: Directory) -> Path | None:
    """The directory's SentencePiece model, None where it has none.

    Raises:
        ValueError: it is not lossless, has more pieces than the model has rows, or other special tokens than the
            configuration says.
    """
    path = directory.path / TOKENIZER
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer(path)
    except ValueError as error:
        raise ValueError(
            f"{error}; or import with --no-tokenizer, and train on ids that this tokenizer made"
        ) from error
    if tokenizer.vocab_size > directory.config.vocab_size:
        raise ValueError(
            f"{path}: has {tokenizer.vocab_size:,} pieces, but the model {directory.config.vocab_size:,} rows; put the "
            "model's own tokenizer there, or import with --no-tokenizer"
        )
    for key, own in (("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id)):
        told = directory.values.get(key)
        known = told if isinstance(told, list) else [told]
        if told is not None and own not in known:
            raise ValueError(
                f"{path}: its {key} is {own}, but config.json says {told}; put the model's own tokenizer there, or "
                "import with --no-tokenizer"
            )
    return path


def _spoken(directory: Directory) -> int:
    """Rows of the vocabulary before those at its end that `generate` never takes."""
    path, count = directory.path / "generation_config.json", directory.config.vocab_size
    suppressed = json.loads(path.read_bytes()).get("suppress_tokens") if path.is_file() else None
    spoken = count - len(suppressed or ())
    return spoken if suppressed == list(range(spoken, count)) else count


def check_directory(directory: Directory) -> Agreement:
    """Compares the model as Rondo computes it with the class's own forward.

    Raises:
        ValueError: they differ, or the class cannot be run here.
    """
    rows = rows_to_compare(directory.config.vocab_size, longest_window(directory.config), None, ())
    rows = Rows(rows.ids, _spoken(directory))
    ours = expected(assemble(directory.config, directory.read).eval(), rows)
    try:
        return compare(rows, ours, directory.stored_as.load_for_check(directory.path))
    except ValueError as error:
        raise ValueError(
            f"{directory.path}: not imported, because as {directory.stored_as.architecture} {error}"
        ) from error


def import_directory(
    source: Path, target: Path, *, with_tokenizer: bool = True, check: bool = True
) -> tuple[Directory, Path | None, Agreement | None]:
    """Writes the checkpoint `target`, and beside it `target`.yaml, a run that trains it on.

    Returns:
        What was read, its tokenizer, and how it was compared.

    Raises:
        ValueError: as `open_directory`, `open_tokenizer` and `check_directory` do, or `target` is in use; nothing is
            left behind then.
    """
    beside = target.with_name(f"{target.name}.yaml")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists and is not an empty directory; name another one, or remove it")
    if beside.exists():
        raise ValueError(f"{beside}: exists, and the run would be described there; name another checkpoint")
    directory = open_directory(source)
    tokenizer = open_tokenizer(directory) if with_tokenizer else None
    foreign = directory.stored_as.write_files is not None  # code that lies in the directory, which is not run
    agreement = check_directory(directory) if check and not foreign else None
    origin = f"{source.resolve().name} ({directory.stored_as.architecture})"
    text = run_yaml(directory.config, target, beside, origin=origin, has_tokenizer=tokenizer is not None)
    write_checkpoint(
        target,
        directory.config,
        directory.shapes,
        directory.read,
        config_yaml=text,
        environment={"imported_from": origin},
        tokenizer=tokenizer,
    )
    beside.write_text(text, encoding="utf-8")
    return directory, tokenizer, agreement


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; name a directory that a model of transformers was saved to") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no mapping; fetch it again")
    return values


def _format_of(path: Path, values: Mapping[str, Any]) -> Format:
    model_type = values.get("model_type")
    known = [found.model_type for found in FORMATS if found.model_config is not None]
    found = by_model_type(model_type) if isinstance(model_type, str) else None
    if found is None:
        close = difflib.get_close_matches(str(model_type), known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{path / 'config.json'}: model_type: {model_type!r}; Rondo imports {', '.join(known)}{hint}")
    if values.get("quantization_config") is not None:
        raise ValueError(
            f"{path / 'config.json'}: quantization_config: given, but only weights in {', '.join(READABLE)} are read; "
            "take the model that this one was quantized from"
        )
    return found


def _distance(tensors: Sequence[Stored], weights: Weights) -> int:
    """How many tensors stand in only one of the two, by name and shape."""
    return len({(tensor.name, tensor.shape) for tensor in tensors} ^ set(weights.shapes.items()))


def _match(path: Path, stored_as: Format, config: ModelConfig, tensors: list[Stored], weights: Weights) -> list[str]:
    """Raises ValueError unless the directory holds just these tensors; a tied head may lie there as well, and those
    that the class has no use for, which are returned."""
    wanted = {tensor.name: tensor for tensor in tensors}
    found = dict(weights.shapes)
    embedding = next(tensor.name for tensor in tensors if tensor.source == "embed.weight")
    if config.tie_embeddings and HEAD in found and HEAD not in wanted:
        del found[HEAD]
        same = weights.shapes[HEAD] == weights.shapes.get(embedding)
        if not same or not torch.equal(weights.read(HEAD), weights.read(embedding)):
            raise ValueError(
                f"{path}: config.json ties the head to the embedding, but {HEAD} and {embedding} differ; set "
                f"tie_word_embeddings to false, or remove {HEAD}, whichever the model was trained with"
            )
    missing = [name for name in wanted if name not in found]
    more = [name for name in found if name not in wanted]
    left_out = [name for name in more if name.endswith(stored_as.unused)]
    extra = [name for name in more if name not in left_out]
    unequal = [
        f"{name} {list(found[name])} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name] != tensor.shape
    ]
    odd = [
        f"{name} {weights.dtypes[name]}" for name in wanted if name in found and weights.dtypes[name] not in READABLE
    ]
    if not (missing or extra or unequal or odd):
        return left_out
    hint = "take the config.json and the weights from one place"
    if missing == [HEAD]:
        hint = "set tie_word_embeddings to true if the head is the embedding"
    told = {"missing": missing, f"not of a {stored_as.architecture}": extra, "of another shape": unequal}
    told[f"in none of the dtypes {', '.join(READABLE)}"] = odd
    faults = "; ".join(f"{what}: {', '.join(names)}" for what, names in told.items() if names)
    raise ValueError(f"{path}: its weights are not those of its config.json: {faults}; {hint}")
