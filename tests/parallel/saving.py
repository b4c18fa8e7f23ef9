"""Checkpoints of a tiny engine, for tests on several ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.checkpoint import CheckpointError
from parallel.grid import Grid
from tests.parallel.tiny import tiny_engine


def save_with(writer: Any, engine: Any, step: int, **overrides: Any) -> None:
    """Begins a checkpoint with what every checkpoint needs; `overrides` replace arguments of `save`."""
    arguments: dict[str, Any] = {
        "progress": {"consumed_samples": 4 * step},
        "config_yaml": "name: tiny\n",
        "environment": {"torch": torch.__version__},
    }
    writer.save(engine, step=step, **arguments | overrides)


def save(engine: Any, directory: Path, step: int, *, keep: dict[str, Any] | None = None, **overrides: Any) -> Path:
    """Writes a checkpoint and waits until it is complete; `keep` says what is kept."""
    from parallel.writer import CheckpointWriter

    writer = CheckpointWriter(engine.grid, directory, **{"keep_last": 3} | (keep or {}))
    save_with(writer, engine, step, **overrides)
    (saved,) = writer.wait()
    return saved.path


def save_steps(grid: Grid, directory: Path, steps: list[int], **arguments: Any) -> None:
    """A checkpoint a step, of an untrained engine."""
    engine = tiny_engine(grid, zero_stage=1)
    for step in steps:
        save(engine, directory, step, **arguments)


def refused(action: Callable[[], Any]) -> str:
    """The words of the CheckpointError that `action` raises."""
    try:
        return f"no error: {action()}"
    except CheckpointError as error:
        return str(error)


def names(directory: Path) -> list[str]:
    """What a directory holds."""
    return sorted(path.name for path in directory.iterdir())
