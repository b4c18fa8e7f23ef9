"""The checkpoint format, and reading it in one process: no process group, no DeepSpeed.

    checkpoints/
      latest -> step_00000500
      best -> step_00000300       of the lowest validation loss
      step_00000500/
        manifest.json             size and sha256 of every other file, written last
        meta.json                 format version, step, progress, parameters and shapes, topology, environment
        index.json                which file holds which tensor
        config.yaml               the run's resolved configuration
        tokenizer.model           the run's tokenizer, if it has one
        tensors_00000.safetensors what the first rank wrote, and so on

A tensor is stored whole, in fp32, once, under a name that no topology enters (`tensor_key`). A directory under its
final name is complete: it was written beside, synced and renamed. Nothing in it is executed when it is read: JSON and
safetensors hold data only. torch.distributed.checkpoint reads it too, with its HuggingFaceStorageReader.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT_VERSION = 2
"""Version 1 kept its tensors in DCP's own files, whose table is a pickle."""

MANIFEST, META, INDEX, CONFIG, TOKENIZER = "manifest.json", "meta.json", "index.json", "config.yaml", "tokenizer.model"

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")
_PREFIXES = {"weight": "model", "exp_avg": "optimizer.exp_avg", "exp_avg_sq": "optimizer.exp_avg_sq"}


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or cannot be read as what it should be."""


def tensor_key(kind: Kind, name: str) -> str:
    """The stored name of what belongs to the parameter `name`: its fp32 weight or one of Adam's moments."""
    return f"{_PREFIXES[kind]}.{name}"


def tensor_file(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"tensors_{rank:05d}.safetensors"


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest step first; whether they are intact is for `verify` to say."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)), key=step_of)


def describe_file(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def verify(path: Path, *, part: int = 0, parts: int = 1) -> None:
    """Checks that a checkpoint is complete and that every file is the one that was written.

    Args:
        path: the checkpoint.
        part, parts: look at every `parts`-th file only, from the `part`-th on, so that ranks can share the reading.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    manifest = _read_json(path, MANIFEST)
    _require_version(path, manifest)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise CheckpointError(f"{path / MANIFEST}: has no mapping files of sizes and sha256; use another checkpoint")
    for name in (META, INDEX):
        if name not in files:
            raise CheckpointError(f"{path / MANIFEST}: does not list {name}; use another checkpoint")
    for name in sorted(files)[part::parts]:
        expected = files[name]
        try:
            size = _inside(path, name).stat().st_size
            if size != expected.get("bytes"):
                raise CheckpointError(
                    f"{path / name}: {size} bytes instead of {expected.get('bytes')}; use another checkpoint"
                )
            if describe_file(path / name) != expected:
                raise CheckpointError(f"{path / name}: its sha256 is not the manifest's; use another checkpoint")
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}; use another checkpoint") from error


def latest_good(
    directory: Path, *, paths: Sequence[Path] | None = None, verify: Callable[[Path], None] = verify
) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint of a run, None if there is none, and why each newer one was passed over.

    Args:
        directory: of the run's checkpoints.
        paths: those to choose from, oldest first; by default all that `directory` holds.
        verify: raises CheckpointError for one that is damaged.
    """
    skipped = []
    for path in reversed(list_checkpoints(directory) if paths is None else paths):
        try:
            verify(path)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return path, skipped
    return None, skipped


def read_meta(path: Path) -> dict[str, Any]:
    """What `meta.json` says: `step`, `progress`, `parameters` (name -> shape), `environment` and more."""
    meta = _read_json(path, META)
    _require_version(path, meta)
    return meta


def read_weights(path: Path, *, verified: bool = False) -> dict[str, Tensor]:
    """The fp32 weights of an intact checkpoint under the names of `LM.named_parameters`, a tied one once.

    Args:
        path: the checkpoint.
        verified: the caller has just verified it, as `latest_good` does; its files are not hashed again.

    Raises:
        CheckpointError: it is damaged.
    """
    if not verified:
        verify(path)
    return {name: weight for (_, name), weight in read_parameters(path, [("weight", name) for name in _shapes(path)])}


@torch.no_grad()
def load_weights(path: Path, model: nn.Module, *, verified: bool = False) -> None:
    """Copies the weights of an intact checkpoint into `model`, one after the other; `verified` as in `read_weights`.

    Raises:
        CheckpointError: it is damaged, or of another model; `model` is unchanged then.
    """
    parameters = dict(model.named_parameters())
    require_parameters(path, {name: p.shape for name, p in parameters.items()})
    if not verified:
        verify(path)
    for (_, name), weight in read_parameters(path, [("weight", name) for name in parameters]):
        parameters[name].copy_(weight)


def require_parameters(path: Path, expected: Mapping[str, Iterable[int]]) -> None:
    """Raises CheckpointError, naming the differences, unless the checkpoint holds just these parameters and shapes."""
    found = {name: list(shape) for name, shape in _shapes(path).items()}
    wanted = {name: list(shape) for name, shape in expected.items()}
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    unequal = [
        f"{name} {found[name]} instead of {wanted[name]}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    if missing or extra or unequal:
        raise CheckpointError(
            f"{path}: a checkpoint of another model: missing {some(missing)}; not in the model {some(extra)}; "
            f"of another shape {some(unequal)}; use the model of its {CONFIG}, or give this run another name"
        )


def _shapes(path: Path) -> dict[str, list[int]]:
    """Of the parameters, by name."""
    shapes = read_meta(path).get("parameters")
    if not isinstance(shapes, dict) or not all(isinstance(shape, list) for shape in shapes.values()):
        raise CheckpointError(f"{path / META}: has no mapping of parameters to shapes; use another checkpoint")
    return shapes


def some(items: Sequence[str], limit: int = 8) -> str:
    """The first of many items, and how many are left."""
    shown = ", ".join(items[:limit]) or "none"
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file of tensors on the CPU, contiguous and none of another's storage, and syncs it. Holds no copy.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb") as file:
        mode = os.fstat(file.fileno()).st_mode
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    path.chmod(mode)  # safetensors leaves it readable by its owner alone
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_index(path: Path) -> dict[str, str]:
    """The name of the file that holds each tensor, by stored name."""
    index = _read_json(path, INDEX)
    if not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(f"{path / INDEX}: does not map tensors to files; use another checkpoint")
    return index


def iter_tensors(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Reads tensors by stored name, file by file, one in memory at a time; the others are left on the disk.

    Raises:
        CheckpointError: a key is not stored, or a file cannot be read.
    """
    index = read_index(path)
    files: dict[str, list[str]] = {}
    for key in keys:
        if key not in index:
            raise CheckpointError(f"{path}: no tensor {key!r}; use another checkpoint")
        files.setdefault(index[key], []).append(key)
    for name, held in files.items():
        try:
            # Read, not mapped: mapped pages would count as this process' memory beside the copies of them.
            with safe_open(_inside(path, name), framework="pt", backend="pread") as file:
                for key in held:
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / name}: tensors cannot be read, {error}; use another checkpoint") from error


def read_parameters(path: Path, wanted: Iterable[tuple[Kind, str]]) -> Iterator[tuple[tuple[Kind, str], Tensor]]:
    """Weights or moments of parameters, whole and fp32 `shape`, one in memory at a time.

    Raises:
        CheckpointError: one is not stored, or is not what meta.json says.
    """
    shapes = _shapes(path)
    named = {tensor_key(kind, name): (kind, name) for kind, name in wanted}
    for key, tensor in iter_tensors(path, named):
        expected = shapes.get(named[key][1])
        if tensor.dtype != torch.float32 or list(tensor.shape) != expected:
            raise CheckpointError(
                f"{path}: {key} is {tensor.dtype} {list(tensor.shape)} instead of torch.float32 {expected}; "
                "use another checkpoint"
            )
        yield named[key], tensor


def _inside(path: Path, name: str) -> Path:
    """A file of the checkpoint: what was written elsewhere may name files that are none of its own."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise CheckpointError(f"{path}: names {name!r}, which is no file of its own; use another checkpoint")
    return path / name


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_bytes())
    except FileNotFoundError:
        what = f"has no {name}: it was not written to its end" if path.is_dir() else "is not a checkpoint directory"
        raise CheckpointError(f"{path}: {what}; use another checkpoint") from None
    except NotADirectoryError:
        raise CheckpointError(f"{path}: is not a checkpoint directory; use another checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / name}: {error}; use another checkpoint") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path / name}: holds no mapping; use another checkpoint")
    return content


def _require_version(path: Path, content: Mapping[str, Any]) -> None:
    version = content.get("format_version")
    if version == FORMAT_VERSION and isinstance(version, int):
        return
    newer = isinstance(version, int) and version > FORMAT_VERSION
    way_out = "update Rondo" if newer else f"use the Rondo that wrote it (git_revision in its {META})"
    raise CheckpointError(f"{path}: format_version {version!r}; this Rondo reads {FORMAT_VERSION}; {way_out}")
