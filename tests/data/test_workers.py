import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.workers import REPORT_EVERY, Task, run_tasks

ROOT = Path(__file__).resolve().parents[2]


def count(index: int) -> Iterator[int]:
    for _ in range(index):
        yield REPORT_EVERY // 2


def fail_on_two(index: int) -> Iterator[int]:
    yield 1
    if index == 2:
        raise ValueError("task 2 is wrong")


class TwoPart(Exception):
    """Cannot be made again from its words alone, as unpickling tries to."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


def fail_with_two_parts(index: int) -> Iterator[int]:
    yield 1
    raise TwoPart("the disk", f"full at {index}")


def fail_with_a_lock(index: int) -> Iterator[int]:
    yield 1
    error = OSError(f"the disk: full at {index}")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    raise error


def die(index: int) -> Iterator[int]:
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


def report_pid_and_work_on(index: int) -> Iterator[int]:
    os.write(sys.stdout.fileno(), f"{os.getpid()}\n".encode())  # in one piece, unlike print
    while True:
        time.sleep(0.05)
        yield REPORT_EVERY


@pytest.mark.parametrize("workers", [1, 3])
def test_runs_every_task_and_counts_all_progress(workers: int) -> None:
    reports = list(run_tasks(count, range(6), workers))
    assert sum(report.tasks for report in reports) == 6
    assert sum(report.units for report in reports) == 15 * (REPORT_EVERY // 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_raised(workers: int) -> None:
    with pytest.raises(ValueError, match="task 2 is wrong"):
        list(run_tasks(fail_on_two, range(5), workers))


@pytest.mark.parametrize(("task", "name"), [(fail_with_two_parts, "TwoPart"), (fail_with_a_lock, "OSError")])
def test_an_error_that_cannot_be_pickled_keeps_its_words(task: Task, name: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{name}: the disk: full at 0$"):
        list(run_tasks(task, range(1), 2))


def test_a_killed_worker_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="a worker process died"):
        list(run_tasks(die, range(2), 2))


def test_workers_stop_when_their_parent_is_killed() -> None:
    program = (
        "from data.workers import run_tasks; from tests.data.test_workers import report_pid_and_work_on; "
        "list(run_tasks(report_pid_and_work_on, range(2), 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    assert parent.stdout.read() == ""  # the pipe ends when no worker holds it any more
    assert len(set(workers)) == 2
    parent.wait()


def test_nothing_to_do() -> None:
    assert list(run_tasks(count, [], 2)) == []
