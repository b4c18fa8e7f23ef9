"""Writing checkpoints from all ranks at once, and continuing from them on any number of ranks.

Each parameter has one owner among the ranks, balanced by size, that keeps its tensors while the others pass on: no rank
ever holds more than its share. The directory is to be seen by all ranks. What fails on one rank is told to all, so that
all raise the same error and none waits for the others.
"""

import dataclasses
import heapq
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from models.checkpoint import (
    CONFIG,
    FORMAT_VERSION,
    KINDS,
    META,
    CheckpointError,
    causes,
    checkpoint_name,
    describe_file,
    latest_good,
    list_checkpoints,
    read_meta,
    read_tensors,
    require_parameters,
    tensor_key,
    verify,
)
from parallel.commit import prepare, publish, retire, write_rest
from parallel.engine import Engine
from parallel.grid import Grid, everywhere
from parallel.state import TrainingState


def save_checkpoint(
    engine: Engine,
    directory: Path,
    *,
    step: int,
    progress: dict[str, Any],
    config_yaml: str,
    environment: dict[str, Any],
    tokenizer_path: Path | None,
    keep_last: int,
    keep_every: int | None,
) -> Path:
    """Writes `directory/step_<step>`, points `latest` at it and removes what is no longer kept. Collective.

    The checkpoint appears under its name once every byte is on the disk. If anything fails on any rank, what was
    written is removed and older checkpoints stay as they are.

    Args:
        engine: what to save.
        directory: of the run's checkpoints.
        step: optimizer steps done.
        progress: what the run needs besides to continue, for example consumed samples; JSON.
        config_yaml, environment, tokenizer_path: stored with it, so that it can be used alone.
        keep_last: number of newest checkpoints that stay.
        keep_every: checkpoints at multiples of this step stay for good. Those beyond `step` go in any case: they belong
            to a course that the run left when it continued from an earlier one.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: on every rank, naming the path and what failed on which rank.
    """
    grid = engine.grid
    final = directory / checkpoint_name(step)
    staging = directory / f".{final.name}.partial"
    meta = _describe(engine) | {"step": step, "progress": progress, "environment": environment}
    contents = {META: json.dumps(meta, indent=1).encode(), CONFIG: config_yaml.encode()}
    with ExitStack() as guard:
        try:
            _on_lead(grid, lambda: prepare(staging, guard))
            files = _write_tensors(engine, staging)
            _on_lead(grid, lambda: write_rest(staging, contents, tokenizer_path, files))
            _on_lead(grid, lambda: publish(staging, final))
        except CheckpointError as error:
            raise CheckpointError(
                f"{final}: not saved: {error}; older checkpoints are intact: mend this and start the run again"
            ) from error
        _on_lead(grid, lambda: retire(directory, step, keep_last, keep_every))
    return final


def load_checkpoint(engine: Engine, path: Path, *, verified: bool = False) -> dict[str, Any]:
    """Continues from a checkpoint, whatever number of ranks and ZeRO stage wrote it. Collective.

    Args:
        engine: what takes it over.
        path: the checkpoint.
        verified: the caller has just verified it, as `find_checkpoint` does; its files are not hashed again. The same
            on all ranks.

    Returns:
        The `progress` it was saved with, and its `step`.

    Raises:
        CheckpointError: on every rank; it is damaged, or of another model, whose differences are listed by name. The
            engine is unchanged then.
    """
    grid, state = engine.grid, engine.state
    shapes = state.shapes
    if not verified:
        _verify(grid, path)
    meta = everywhere(grid, lambda: _read_training_meta(path, shapes), CheckpointError)
    owners = _owners(state, grid.world_size)
    keys = [tensor_key(kind, name) for name, owner in owners.items() if owner == grid.rank for kind in KINDS]
    generators = _generators(grid) if meta["ranks"] == _ranks(grid) else {}
    tensors = everywhere(grid, lambda: read_tensors(path, [*keys, *generators]), CheckpointError)

    for name, owner in owners.items():
        for kind in KINDS:
            if owner == grid.rank:
                value = tensors.pop(tensor_key(kind, name)).to(grid.device)
            else:
                value = torch.empty(shapes[name], device=grid.device)
            dist.broadcast(value, src=owner)
            state.assign(name, kind, value)
    state.num_updates = meta["num_updates"]
    for key, (_, restore) in generators.items():
        restore(tensors[key])
    return meta["progress"] | {"step": meta["step"]}


def find_checkpoint(grid: Grid, directory: Path) -> tuple[Path | None, list[str]]:
    """`models.checkpoint.latest_good`, the reading shared among all ranks. Collective.

    The lead's listing counts: a shared file system may show ranks different ones for a while, and ranks that verified
    different checkpoints would wait for each other.
    """
    listed = everywhere(grid, lambda: list_checkpoints(directory) if grid.is_lead else [], CheckpointError)
    return latest_good(directory, paths=grid.broadcast(listed), verify=lambda path: _verify(grid, path))


def _on_lead(grid: Grid, action: Callable[[], None]) -> None:
    """`everywhere`, with something to do on the first rank only."""
    everywhere(grid, action if grid.is_lead else lambda: None, CheckpointError)


def _verify(grid: Grid, path: Path) -> None:
    everywhere(grid, lambda: verify(path, part=grid.rank, parts=grid.world_size), CheckpointError)


def _read_training_meta(path: Path, shapes: Mapping[str, Iterable[int]]) -> dict[str, Any]:
    """`read_meta` of a checkpoint of these parameters that training can continue from."""
    require_parameters(path, shapes)
    meta = read_meta(path)
    missing = [key for key in ("step", "progress", "num_updates", "ranks") if key not in meta]
    if missing:
        raise CheckpointError(f"{path / META}: has no {', '.join(missing)}; continue from one that train.py wrote")
    return meta


def _ranks(grid: Grid) -> dict[str, Any]:
    """What random number generators a checkpoint holds."""
    return {"world_size": grid.world_size, "device": grid.device.type}


def _describe(engine: Engine) -> dict[str, Any]:
    """What `meta.json` says of an engine."""
    return {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(engine.module.config),
        "parameters": {name: list(shape) for name, shape in engine.state.shapes.items()},
        "num_updates": engine.state.num_updates,
        "precision": engine.precision,
        "zero_stage": engine.parallel.zero_stage,
        "ranks": _ranks(engine.grid),
    }


def _owners(state: TrainingState, world_size: int) -> dict[str, int]:
    """The rank that keeps each parameter's tensors: the largest first, to the rank with the least so far."""
    loads = [(0, rank) for rank in range(world_size)]
    owners = {}
    for name, shape in sorted(state.shapes.items(), key=lambda item: (-item[1].numel(), item[0])):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + shape.numel(), rank))
        owners[name] = rank
    return owners


def _generators(grid: Grid) -> dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """This rank's global random number generators: stored name -> (get, set) of its state."""
    generators: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]] = {
        f"rng.cpu.{grid.rank}": (torch.get_rng_state, torch.set_rng_state)
    }
    if grid.device.type == "cuda":
        generators[f"rng.cuda.{grid.rank}"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
    return generators


def _write_tensors(engine: Engine, staging: Path) -> dict[str, dict[str, Any]]:
    """Writes every rank's share of the tensors, synced. Collective; returns the manifest's entries for the files."""
    grid, state = engine.grid, engine.state
    tensors = {key: get() for key, (get, _) in _generators(grid).items()}
    for name, owner in _owners(state, grid.world_size).items():
        for kind in KINDS:
            whole = state.gather(name, kind)
            if owner == grid.rank:
                tensors[tensor_key(kind, name)] = whole.cpu()
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(staging))
    except CheckpointException as error:  # on every rank, wherever it happened
        raise CheckpointError(causes(error)) from error
    mine = everywhere(
        grid, lambda: {path.name: describe_file(path) for path in staging.glob(f"__{grid.rank}_*")}, CheckpointError
    )
    shares: list[dict[str, Any]] = [{}] * grid.world_size
    dist.all_gather_object(shares, mine)
    return {name: entry for share in shares for name, entry in share.items()}
