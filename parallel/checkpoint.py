"""Continuing from a checkpoint on any number of ranks, however they are arranged (`parallel/writer.py` writes them).

Each tensor is read by one of the ranks of a pipeline stage that holds it, and broadcast among them: no rank holds more
than its share and one whole tensor. What fails on one rank is told to all, so that all raise the same error and none
waits for the others.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.checkpoint import (
    KINDS,
    META,
    CheckpointError,
    Kind,
    iter_tensors,
    latest_good,
    list_checkpoints,
    read_index,
    read_meta,
    read_parameters,
    require_parameters,
    some,
    tensor_key,
    verify,
)
from parallel.commit import give_back
from parallel.engine import Engine
from parallel.grid import Grid, everywhere
from parallel.snapshot import tensor_owners

TRAINING_ENTRIES = {"step": int, "model": dict, "progress": dict, "num_updates": int, "ranks": dict}
"""Of meta.json."""


def load_checkpoint(engine: Engine, path: Path, *, verified: bool = False) -> dict[str, Any]:
    """Continues from a checkpoint, whatever ranks and ZeRO stage wrote it. Collective.

    Args:
        engine: what takes it over.
        path: the checkpoint.
        verified: the caller has just verified it, as `find_checkpoint` does; its files are not hashed again. The same
            on all ranks.

    Returns:
        The `progress` it was saved with, and its `step`.

    Raises:
        CheckpointError: on every rank; it is damaged, of another model, whose differences are listed by name, or lacks
            the optimizer's state. The engine is unchanged then.
    """
    grid, state = engine.grid, engine.state
    if not verified:
        _verify(grid, path)
    meta = everywhere(grid, lambda: _read_training_meta(path, state.shapes), CheckpointError)
    axis = grid.axes["stage"]
    owners = tensor_owners(state, state.names, axis.size)
    mine = [item for item, owner in owners.items() if owner == axis.index]
    generators = random_generators(grid) if meta["ranks"] == random_state_of(grid) else {}
    tensors, states = everywhere(grid, lambda: _read(path, mine, generators), CheckpointError)

    for name in state.names:
        for kind in KINDS:
            owner = owners[kind, name]
            if owner == axis.index:
                value = tensors.pop((kind, name)).to(grid.device)
            else:
                value = torch.empty(state.shapes[name], device=grid.device)
            if axis.size > 1:
                dist.broadcast(value, src=axis.ranks[owner], group=axis.group)
            state.assign(name, kind, value)
    state.num_updates = meta["num_updates"]
    for key, (_, restore) in generators.items():
        restore(states[key])
    return meta["progress"] | {"step": meta["step"]}


def find_checkpoint(grid: Grid, directory: Path) -> tuple[Path | None, list[str]]:
    """`models.checkpoint.latest_good`, the reading shared among all ranks. Collective.

    The lead's listing counts: a shared file system may show ranks different ones for a while, and ranks that verified
    different checkpoints would wait for each other.
    """

    def look() -> list[Path]:
        give_back(directory)
        return list_checkpoints(directory)

    listed = everywhere(grid, lambda: look() if grid.is_lead else [], CheckpointError)
    return latest_good(directory, paths=grid.broadcast(listed), verify=lambda path: _verify(grid, path))


def on_lead(grid: Grid, action: Callable[[], None]) -> None:
    """`everywhere`, with something to do on the first rank only."""
    everywhere(grid, action if grid.is_lead else lambda: None, CheckpointError)


def random_generators(grid: Grid) -> dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """This rank's global random number generators: stored name -> (get, set) of its state."""
    generators: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]] = {
        f"rng.cpu.{grid.rank}": (torch.get_rng_state, torch.set_rng_state)
    }
    if grid.device.type == "cuda":
        generators[f"rng.cuda.{grid.rank}"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
    return generators


def random_state_of(grid: Grid) -> dict[str, Any]:
    """Whose random numbers a checkpoint can continue: those of as many ranks on the same kind of device."""
    return {"world_size": grid.world_size, "device": grid.device.type}


def _verify(grid: Grid, path: Path) -> None:
    everywhere(grid, lambda: verify(path, part=grid.rank, parts=grid.world_size), CheckpointError)


def _read(
    path: Path, items: list[tuple[Kind, str]], generators: Iterable[str]
) -> tuple[dict[tuple[Kind, str], Tensor], dict[str, Tensor]]:
    """This rank's share of weights and moments, and of the states of its random number generators."""
    return dict(read_parameters(path, items)), dict(iter_tensors(path, generators))


def read_training_meta(path: Path) -> dict[str, Any]:
    """`read_meta` of a checkpoint that says what training needs to continue."""
    meta = read_meta(path)
    missing = [key for key, kind in TRAINING_ENTRIES.items() if not isinstance(meta.get(key), kind)]
    if missing:
        raise CheckpointError(f"{path / META}: has no {', '.join(missing)}; continue from one that train.py wrote")
    return meta


def _read_training_meta(path: Path, shapes: Mapping[str, Iterable[int]]) -> dict[str, Any]:
    """`read_training_meta` of a checkpoint of these parameters and their moments."""
    require_parameters(path, shapes)
    meta = read_training_meta(path)
    index = read_index(path)
    absent = [key for name in shapes for kind in KINDS if (key := tensor_key(kind, name)) not in index]
    if absent:
        raise CheckpointError(
            f"{path}: training cannot continue from it, it lacks {some(absent)}; continue from one that train.py wrote "
            "(exports and evaluations need the weights alone)"
        )
    return meta
