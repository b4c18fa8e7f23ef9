"""The tensors of a Hugging Face directory: sharded safetensors written and read a tensor at a time."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.config import ModelConfig
from models.hf.formats import Stored, stays_fp32
from models.lm import LM

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


class WeightsFile(NamedTuple):
    """One file of weights, and its tensors in order."""

    name: str
    tensors: list[Stored]
    num_bytes: int


def parse_size(text: str) -> int:
    """Bytes of "5GB" and its like. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?b)?", text.strip().lower())
    if match is None or not float(match[1]):
        raise ValueError(f"--max-shard-size: {text!r}; must be a number of bytes, or one of KB, MB or GB: 5GB")
    return int(float(match[1]) * UNITS[match[2] if match[2] in UNITS else ""])


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter of the model, a tied one once."""
    with torch.device("meta"):
        model = LM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def stored_dtype(tensor: Stored, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if stays_fp32(tensor.source) else dtype


def num_bytes(tensor: Stored, dtype: torch.dtype) -> int:
    return torch.Size(tensor.shape).numel() * stored_dtype(tensor, dtype).itemsize


def plan_files(tensors: Iterable[Stored], dtype: torch.dtype, max_bytes: int) -> list[WeightsFile]:
    """Which tensor goes into which file; one that is larger than `max_bytes` gets a file of its own."""
    shards: list[list[Stored]] = [[]]
    filled = 0
    for tensor in tensors:
        size = num_bytes(tensor, dtype)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    count = len(shards)
    names = [WHOLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return [
        WeightsFile(name, shard, sum(num_bytes(tensor, dtype) for tensor in shard))
        for name, shard in zip(names, shards, strict=True)
    ]


def write_weights(directory: Path, files: list[WeightsFile], dtype: torch.dtype, read: Callable[[str], Tensor]) -> None:
    """Writes the files, and their index where there are several; never holds more than one file and one parameter.

    Args:
        read: a parameter of the model by its name, fp32.

    Raises:
        OSError: a file cannot be written, for example as the disk is full.
    """
    for file in files:
        held: dict[str, Tensor] = {}  # the parameter that several tensors are parts of is read once
        contents = {}
        for tensor in file.tensors:
            if tensor.source not in held:
                held = {tensor.source: read(tensor.source)}
            contents[tensor.name] = tensor.cut(held[tensor.source]).to(stored_dtype(tensor, dtype))
        try:
            save_file(contents, directory / file.name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(
                f"{directory / file.name}: cannot be written ({error}); make room, or name another"
            ) from error
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(file.num_bytes for file in files)},
            "weight_map": {tensor.name: file.name for file in files for tensor in file.tensors},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Weights:
    """The tensors of a directory, left on the disk: `shapes` and `dtypes` by name."""

    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored, in memory of its own."""
        # read, not mapped: mapped pages would count as this process' memory beside the copies of them
        with safe_open(self.files[name], framework="pt", backend="pread") as file:
            return file.get_tensor(name)


def open_weights(directory: Path) -> Weights:
    """
    Raises:
        ValueError: the directory holds no safetensors, a file is missing or damaged, or the index names another file
            for a tensor than holds it. No other format is read: a pickle runs what it likes.
    """
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for path in _weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    part: Any = file.get_slice(name)
                    files[name], shapes[name], dtypes[name] = path, tuple(part.get_shape()), part.get_dtype()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); fetch the file again") from error
    return Weights(files, shapes, dtypes)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index}: has no weight_map ({error!r}); fetch the file again") from error
        outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise ValueError(f"{index}: names {outside[0]!r}, which is no file of this directory; fetch it again")
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ValueError(f"{directory}: its index names {', '.join(missing)}, which it lacks; fetch these files")
        return [directory / name for name in names]
    if (directory / WHOLE).is_file():
        return [directory / WHOLE]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise ValueError(
            f"{directory}: its weights are pickles ({pickles[0]}), which run code when they are opened; only "
            "safetensors are read: fetch the repository's safetensors, or in a sandbox load them with transformers and "
            "save_pretrained them again"
        )
    raise ValueError(f"{directory}: holds neither {WHOLE} nor {INDEX}; name a directory with a model's weights")
