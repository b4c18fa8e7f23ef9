"""Writing checkpoints from all ranks at once, while training goes on.

Each tensor has one owner among the ranks of its pipeline stage, balanced by size, that copies it to host memory while
the others pass on: no rank ever holds more than its share and one whole tensor. The loop waits for this copy alone.
Then a thread of each rank writes, syncs and hashes its file; once all have, the lead writes the manifest and gives the
checkpoint its name. Ranks agree at step boundaries, in `poll`, where no other collective of theirs is under way;
what fails on one is told to all, so that all raise the same error and none waits for the others.

The directory is to be seen by all ranks.
"""

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.checkpoint import (
    CONFIG,
    FORMAT_VERSION,
    INDEX,
    META,
    TOKENIZER,
    CheckpointError,
    checkpoint_name,
    describe_file,
    tensor_file,
    write_tensors,
)
from parallel.checkpoint import on_lead, random_generators, random_state_of
from parallel.commit import publish, retire, stage, write_rest
from parallel.engine import Engine
from parallel.grid import Grid, everywhere
from parallel.saved import Saved
from parallel.snapshot import HostCopies


@dataclass(frozen=True)
class _Share:
    """What one rank has written: entries of the manifest and the index."""

    files: dict[str, dict[str, Any]]
    tensors: dict[str, str]
    num_bytes: int
    seconds: float


@dataclass
class _Save:
    """A save under way.

    Attributes:
        started: when `save` was called.
        task: what a thread of this rank does for it: first writes its share, then, on the lead, commits.
        contents: files besides the tensors, on the lead.
        shares: of all ranks; None while they are being written.
    """

    final: Path
    step: int
    started: float
    task: Future
    contents: dict[str, bytes]
    stall: float = 0.0
    shares: list[_Share] | None = None


class CheckpointWriter:
    """Saves below one directory, which the caller's run has to itself (`training/run_directory.py` locks it).

    Its methods are collective.

    Args:
        grid: the ranks.
        directory: of the run's checkpoints.
        keep_last: number of newest checkpoints that stay.
        keep_every: checkpoints at multiples of this step stay for good.
        keep_best: the one with the lowest validation loss stays, and the link `best` points at it.
        asynchronous: `save` returns after the copy to host memory, and training must call `poll` after each step;
            otherwise it returns once the checkpoint is complete.
    """

    def __init__(
        self,
        grid: Grid,
        directory: Path,
        *,
        keep_last: int,
        keep_every: int | None = None,
        keep_best: bool = True,
        asynchronous: bool = False,
    ) -> None:
        self.grid = grid
        self.directory = directory
        self.asynchronous = asynchronous
        self._retire = partial(retire, directory, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
        self._copies = HostCopies()
        self._save: _Save | None = None
        self._complete: list[Saved] = []

    def save(
        self,
        engine: Engine,
        *,
        step: int,
        progress: dict[str, Any],
        config_yaml: str,
        environment: dict[str, Any],
        tokenizer_path: Path | None = None,
        validation: dict[str, Any] | None = None,
    ) -> None:
        """Begins the checkpoint `step_<step>`, after the one before it is complete.

        It appears under its name once every byte is on the disk. If anything fails on any rank, what was written is
        removed and older checkpoints stay as they are.

        Args:
            engine: what to save.
            step: optimizer steps done.
            progress: what the run needs besides to continue, for example consumed samples; JSON.
            config_yaml, environment, tokenizer_path: stored with it, so that it can be used alone.
            validation: `loss` and `tokens` of a validation after this step.

        Raises:
            CheckpointError: on every rank, naming the path and what failed on which rank, now or in the save before.
        """
        started = time.perf_counter()
        self._finish()
        grid = self.grid
        final = self.directory / checkpoint_name(step)
        staging = _staging(final)
        meta = _describe(engine) | {
            "step": step,
            "progress": progress,
            "validation": validation,
            "environment": environment,
        }
        contents: dict[str, bytes] = {}

        def begin() -> None:
            stage(staging)
            contents.update({META: json.dumps(meta, indent=1).encode(), CONFIG: config_yaml.encode()})
            if tokenizer_path is not None:
                contents[TOKENIZER] = tokenizer_path.read_bytes()

        try:
            on_lead(grid, begin)
        except CheckpointError as error:
            raise self._failed(final, error) from error
        tensors = self._copies.take(grid, engine.state)
        tensors |= {key: get() for key, (get, _) in random_generators(grid).items()}
        path = staging / tensor_file(grid.rank)
        self._save = _Save(final, step, started, _in_background(lambda: _write(path, tensors)), contents)
        self._save.stall = time.perf_counter() - started
        if not self.asynchronous:
            self._finish()

    def poll(self) -> list[Saved]:
        """The checkpoints that have become complete since the last call; to be called after each step.

        It does not wait. With nothing under way it does not communicate either.

        Raises:
            CheckpointError: on every rank; a save failed in the background. Older checkpoints are intact.
        """
        self._advance()
        complete, self._complete = self._complete, []
        return complete

    def wait(self) -> list[Saved]:
        """`poll`, once nothing is under way any more; to be called before the run ends or looks for a checkpoint."""
        self._finish()
        return self.poll()

    def _finish(self) -> None:
        """Goes on until nothing is under way, in short turns: no rank sits in a collective while others write."""
        pause = 0.001
        while self._save is not None:
            self._advance()
            if self._save is not None:
                time.sleep(pause)
                pause = min(2 * pause, 0.1)

    def _advance(self) -> None:
        """Takes the save under way one step further if all ranks have done theirs."""
        save = self._save
        if save is None:
            return
        busy = torch.tensor(int(not save.task.done()), device=self.grid.device)
        dist.all_reduce(busy)
        if busy:
            return
        try:
            result = everywhere(self.grid, save.task.result, CheckpointError)
            if save.shares is None:
                save.shares = [result] * self.grid.world_size
                dist.all_gather_object(save.shares, result)
                save.task = _in_background(lambda: self._commit(save) if self.grid.is_lead else ())
                return
        except CheckpointError as error:
            self._save = None
            raise self._failed(save.final, error) from error
        self._save = None
        seconds = time.perf_counter() - save.started
        self._complete.append(
            Saved(
                path=save.final,
                step=save.step,
                num_bytes=sum(share.num_bytes for share in save.shares),
                stall=save.stall if self.asynchronous else seconds,
                write_seconds=max(share.seconds for share in save.shares),
                seconds=seconds,
                problems=result,
            )
        )

    def _failed(self, final: Path, error: CheckpointError) -> CheckpointError:
        """Removes what was written, and says so."""
        if self.grid.is_lead:
            shutil.rmtree(_staging(final), ignore_errors=True)
        return CheckpointError(
            f"{final}: not saved: {error}; older checkpoints are intact: mend this and start the run again"
        )

    def _commit(self, save: _Save) -> tuple[str, ...]:
        """Publishes what all ranks have written. On the lead; returns what could not be removed."""
        assert save.shares is not None
        staging = _staging(save.final)
        index = {key: name for share in save.shares for key, name in share.tensors.items()}
        files = {name: entry for share in save.shares for name, entry in share.files.items()}
        write_rest(staging, save.contents | {INDEX: json.dumps(index, indent=1).encode()}, files)
        publish(staging, save.final)
        try:
            return tuple(self._retire(step=save.step))
        except OSError as error:  # the checkpoint stands; if others cannot go, the disk will say so one day
            return (f"older checkpoints cannot be removed: {error}",)


def _staging(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _in_background(action: Callable[[], Any]) -> Future:
    """Runs `action` in a thread that does not keep the process from ending."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _write(path: Path, tensors: dict[str, Tensor]) -> _Share:
    started = time.perf_counter()
    write_tensors(path, tensors)
    files = {path.name: describe_file(path)}
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return _Share(files, dict.fromkeys(tensors, path.name), num_bytes, time.perf_counter() - started)


def _describe(engine: Engine) -> dict[str, Any]:
    """What `meta.json` says of an engine."""
    return {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(engine.module.config),
        "parameters": {name: list(shape) for name, shape in engine.state.shapes.items()},
        "num_updates": engine.state.num_updates,
        "precision": engine.precision,
        "zero_stage": engine.parallel.zero_stage,
        "ranks": random_state_of(engine.grid),
    }
