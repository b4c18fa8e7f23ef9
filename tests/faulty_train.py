"""train.py with faults, one run after another in one process: python tests/faulty_train.py '[[FAULTS, ARGUMENTS], ...]'

FAULTS is a mapping, of which any may be left out:

    factor, samples   rows of these sample numbers have their loss multiplied by the factor, for example NaN
    skipped           a fresh run starts with these ranges left out
    slow              {rank: seconds} that each forward pass in training takes longer
    hang              [rank, step]: that rank sleeps in the forward pass of that step

The exit code of each run is printed as "exit code N".
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train
import training.start
from data.loader import Batch, Loader
from models.lm import LM
from parallel.engine import Engine

RANK = int(os.environ.get("RANK", "0"))


def key(row: Any) -> bytes:
    return row.numpy().tobytes()


@contextlib.contextmanager
def faults(
    factor: float = 1.0,
    samples: list[int] | None = None,
    skipped: list[list[int]] | None = None,
    slow: dict[str, float] | None = None,
    hang: list[int] | None = None,
) -> Iterator[None]:
    bad: set[bytes] = set()
    steps = [0]
    microbatch, forward, step = Loader._microbatch, LM.forward, Engine.step

    def read(loader: Loader, numbers: list[int]) -> Batch:
        batch = microbatch(loader, numbers)
        bad.update(key(row) for number, row in zip(numbers, batch.input_ids) if number in (samples or ()))
        return batch

    def run(model: LM, input_ids: Any, *arguments: Any, **options: Any) -> Any:
        nll, log_z = forward(model, input_ids, *arguments, **options)
        if not model.training:
            return nll, log_z
        time.sleep((slow or {}).get(str(RANK), 0.0))
        if hang == [RANK, steps[0]]:
            time.sleep(1000)
        weights = nll.new_tensor([factor if key(row) in bad else 1.0 for row in input_ids])
        return nll * weights[:, None], log_z

    def count(engine: Engine, *arguments: Any, **options: Any) -> Any:
        steps[0] += 1
        return step(engine, *arguments, **options)

    fresh = functools.partial(training.start.Progress, skipped=tuple(map(tuple, skipped or ())))
    with (
        mock.patch.object(Loader, "_microbatch", read),
        mock.patch.object(LM, "forward", run),
        mock.patch.object(Engine, "step", count),
        mock.patch.object(training.start, "Progress", lambda **kept: training_progress(kept, fresh)),
    ):
        yield


def training_progress(kept: dict[str, Any], fresh: Any) -> Any:
    from training.progress import Progress

    return Progress(**kept) if kept else fresh()


if __name__ == "__main__":
    for wanted, arguments in json.loads(sys.argv[1]):
        with faults(**wanted):
            code = train.main(arguments)
        if torch.distributed.is_initialized():  # a run that fails leaves it to the end of its process
            torch.distributed.destroy_process_group()
        print("exit code", code, flush=True)
    sys.exit(code)
