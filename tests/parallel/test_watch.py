"""A dead peer: train.py on two processes, one of them killed or stopped in a step."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from parallel.grid import Grid
from tests.parallel.launch import Ranks

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 0.2
"""Minutes, of the runs."""


def train_on(grid: Grid, directory: Path) -> None:
    """The process becomes one of train.py, whose standard error goes to a file."""
    import train

    said = os.open(directory / f"said_{grid.rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 2)
    arguments = ["train.steps=1000000", "checkpoint.every=1000000", "eval.every=null", "log.every=1", "name=watched"]
    arguments += [f"log.directory={directory}", f"parallel.timeout_minutes={TIMEOUT}", "parallel.tensor=2"]
    with mock.patch.object(train, "init_distributed", return_value=grid):
        code = train.main([str(ROOT / "configs" / "debug_rglru.yaml"), *arguments])
    os._exit(code)


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Ranks]:
    """Two ranks, some steps on, without a launcher, which would end the others by itself; the first keeps the store."""
    ranks = Ranks(2)
    ranks.start(train_on, directory=tmp_path)
    metrics = tmp_path / "watched" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text(encoding="utf-8").count('"loss"') >= 3):
        assert ranks.alive, (tmp_path / "said_0").read_text(encoding="utf-8")
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield ranks
    ranks.close()


CASES = [
    (1, signal.SIGKILL, r"rank 1 gives no sign of life, last seen .*; \w+ at parallel/\S+ .* failed: "),
    (1, signal.SIGSTOP, r"rank 1 gave no sign of life for 6 s, last seen .*; this rank was in \w+ at parallel/"),
    pytest.param(
        *(0, signal.SIGKILL, r"the store of the job is gone, .*; \w+ at parallel/\S+ .* failed: "),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        *(0, signal.SIGSTOP, r"store of the job gave no answer for 6 s: rank 0 .*; this rank was in \w+ at parallel/"),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("victim", "number", "message"), CASES)
def test_the_other_ends_and_names_rank_and_operation(
    training: Ranks, tmp_path: Path, victim: int, number: signal.Signals, message: str
) -> None:
    pid = training.processes[victim].pid
    assert pid is not None
    os.kill(pid, number)
    survivor = training.processes[1 - victim]
    survivor.join(timeout=TIMEOUT * 60)
    assert survivor.exitcode not in (None, 0), "it ended by itself, as failed"
    said = (tmp_path / f"said_{1 - victim}").read_text(encoding="utf-8")
    assert re.search(message, said), said
