"""A dead peer: train.py on two processes, one of them killed or stopped in a step."""

import json
import os
import re
import signal
import subprocess
import sys
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
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            (1, signal.SIGSTOP, r"rank 1 gave no sign of life for 6 s, last seen .*; this rank was in \w+ at "),
            (0, signal.SIGKILL, r"the store of the job is gone, .*; \w+ at parallel/\S+ .* failed: "),
            (0, signal.SIGSTOP, r"store of the job gave no answer for 6 s: rank 0 .*; this rank was in \w+ at "),
        )
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
    ended = json.loads((tmp_path / "watched" / "exit.json").read_text(encoding="utf-8"))
    assert (ended["reason"], ended["resumable"]) == ("failed", True)
    assert ended["detail"] in said, "in the same words"
    if victim == 1:  # the other one is the lead, who writes the log
        last = json.loads((tmp_path / "watched" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        assert (last["event"], last["detail"]) == ("failed", ended["detail"])


ENDS_WHILE_ASKING = """
import sys, time
from unittest import mock

import torch
from torch.distributed import TCPStore

from parallel.grid import Grid
from parallel.watch import Watch

store = TCPStore("127.0.0.1", 0, 1, is_master=True)
grid = Grid(rank=0, world_size=2, local_rank=0, device=torch.device("cpu"), axes={"data": None})
with mock.patch("torch.distributed.distributed_c10d._get_default_store", return_value=store):
    watch = Watch(grid, timeout_minutes=60.0)
watch.interval, watch.silence = 1e-6, 1e9
if sys.argv[1] == "left open":
    __import__("atexit").unregister(watch.close)
time.sleep(2.5)
"""


def endings(watch: str) -> list[int]:
    command = [sys.executable, "-c", ENDS_WHILE_ASKING, watch]
    return [subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, check=False).returncode for _ in range(8)]


@pytest.mark.slow
def test_a_process_that_ends_while_its_watch_asks_the_store_is_not_aborted() -> None:
    assert set(endings("closed at exit")) == {0}
    assert -signal.SIGABRT in endings("left open")
