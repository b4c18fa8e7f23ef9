"""The checkpoint format, and reading it in one process: no process group, no DeepSpeed.

    checkpoints/
      latest -> step_00000500
      step_00000500/
        manifest.json           size and sha256 of every other file, written last
        meta.json               format version, step, progress, parameters and shapes, topology, environment
        config.yaml             the run's resolved configuration
        tokenizer.model         the run's tokenizer, if it has one
        .metadata, __*.distcp   tensors, as torch.distributed.checkpoint stores them

A tensor is stored whole, in fp32, once, under a name that no topology enters (`tensor_key`). A directory under its
final name is complete: it was written beside, synced and renamed.
"""

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

FORMAT_VERSION = 1

MANIFEST, META, CONFIG, TOKENIZER = "manifest.json", "meta.json", "config.yaml", "tokenizer.model"

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")
_PREFIXES = {"weight": "model", "exp_avg": "optimizer.exp_avg", "exp_avg_sq": "optimizer.exp_avg_sq"}


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or cannot be read as what it should be."""


def tensor_key(kind: Kind, name: str) -> str:
    """The stored name of what belongs to the parameter `name`: its fp32 weight or one of Adam's moments."""
    return f"{_PREFIXES[kind]}.{name}"


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest step first; whether they are intact is for `verify` to say."""
    if not directory.is_dir():
        return []
    return sorted(
        (path for path in directory.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)),
        key=lambda path: int(path.name.removeprefix("step_")),
    )


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
    for name in sorted(files)[part::parts]:
        expected = files[name]
        try:
            size = (path / name).stat().st_size
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
    names = _parameters(path)
    tensors = read_tensors(path, [tensor_key("weight", name) for name in names])
    return {name: tensors[tensor_key("weight", name)] for name in names}


@torch.no_grad()
def load_weights(path: Path, model: nn.Module, *, verified: bool = False) -> None:
    """Copies the weights of an intact checkpoint into `model`; `verified` as in `read_weights`.

    Raises:
        CheckpointError: it is damaged, or of another model; `model` is unchanged then.
    """
    require_parameters(path, {name: p.shape for name, p in model.named_parameters()})
    weights = read_weights(path, verified=verified)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def require_parameters(path: Path, expected: Mapping[str, Iterable[int]]) -> None:
    """Raises CheckpointError, naming the differences, unless the checkpoint holds just these parameters and shapes."""
    found = {name: list(shape) for name, shape in _parameters(path).items()}
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
            f"{path}: a checkpoint of another model: missing {_some(missing)}; not in the model {_some(extra)}; "
            f"of another shape {_some(unequal)}; use the model of its {CONFIG}, or give this run another name"
        )


def _parameters(path: Path) -> dict[str, list[int]]:
    parameters = read_meta(path).get("parameters")
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{path / META}: has no mapping of parameters to shapes; use another checkpoint")
    return parameters


def _some(items: list[str], limit: int = 8) -> str:
    shown = ", ".join(items[:limit]) or "none"
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown


def read_tensors(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """Reads tensors by stored name, on the CPU; the others are left on the disk.

    Raises:
        CheckpointError: a key is not stored, or the storage cannot be read.
    """
    reader = _Reader(path)
    try:
        stored = reader.read_metadata().state_dict_metadata
        tensors: dict[str, Any] = {}
        for key in keys:
            entry = stored.get(key)
            if not isinstance(entry, TensorStorageMetadata):
                raise CheckpointError(f"{path}: no tensor {key!r}; use another checkpoint")
            tensors[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (OSError, pickle.UnpicklingError, EOFError, CheckpointException) as error:
        raise CheckpointError(f"{path}: tensors cannot be read, {causes(error)}; use another checkpoint") from error
    return tensors


def causes(error: BaseException) -> str:
    """One line on what went wrong; where ranks failed together, what happened on each."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {causes(exception)}" for rank, (exception, _) in sorted(error.failures.items()))
    return f"{type(error).__name__}: {error}"


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_bytes())
    except FileNotFoundError:
        what = f"has no {name}: it was not written to its end" if path.is_dir() else "is not a checkpoint directory"
        raise CheckpointError(f"{path}: {what}; use another checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / name}: {error}; use another checkpoint") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path / name}: holds no mapping; use another checkpoint")
    return content


def _require_version(path: Path, content: Mapping[str, Any]) -> None:
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version!r}; this Rondo reads {FORMAT_VERSION}; use the one that wrote it"
        )


class _Unpickler(pickle.Unpickler):
    """Builds DCP's tables and nothing else: a pickle may otherwise call anything."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePosixPath  # the module differs between Python versions
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which no checkpoint holds")


_HARMLESS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _Reader(dcp.FileSystemReader):
    """DCP's reader with a restricted unpickler; tensors it reads with `weights_only` already."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(".metadata holds no table of tensors")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata
