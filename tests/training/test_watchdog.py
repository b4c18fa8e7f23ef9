"""The thread that ends a job which hangs, in processes that hang in several ways."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
import training.watchdog
from training.health import HealthConfig
from training.watchdog import Watchdog
training.watchdog.GRACE = 0.2

def say(what):
    print("last words:", what, flush=True)
    {last_words}

def hang_here():
    {hang}

watchdog = Watchdog(
    Path(sys.argv[1]), 3, HealthConfig(hang_factor=10.0, hang_minutes=0.3 / 60), last_words=say, exit_code=9
)
{before}
for _ in range(5):
    with watchdog.step():
        time.sleep(0.01)
    time.sleep({between})
with watchdog.step():
    hang_here()
watchdog.close()
print("done")
"""

SLEEP = "time.sleep(60)"
HOLD_THE_INTERPRETER = "ctypes.PyDLL(None).sleep(60)"


def watched(tmp_path: Path, hang: str, before: str = "", between: float = 0.0, last_words: str = "pass"):
    program = PROGRAM.format(hang=hang, before=before, between=between, last_words=last_words)
    return subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=30
    )


@pytest.mark.parametrize("last_words", ["pass", "raise OSError('disk full')", SLEEP])
def test_a_step_that_hangs_ends_the_process_and_leaves_its_stacks(tmp_path: Path, last_words: str) -> None:
    done = watched(tmp_path, SLEEP, last_words=last_words)
    assert done.returncode == 9
    assert "last words: hang: rank 3 was in one step for more than 0 s; stacks in" in done.stdout
    stacks = (tmp_path / "stacks" / "rank_3.txt").read_text()
    assert "in hang_here" in stacks
    assert "in _watch" in stacks
    if last_words == "pass":
        assert "in hang_here" in done.stderr


def test_a_main_thread_that_keeps_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    done = watched(tmp_path, HOLD_THE_INTERPRETER)
    assert done.returncode == 1
    assert "in hang_here" in done.stderr


def test_what_lies_outside_of_steps_may_take_long(tmp_path: Path) -> None:
    """Five pauses each longer than the limit, and a first step."""
    slow_start = "\n".join(["with watchdog.step():", "    time.sleep(0.5)"])
    done = watched(tmp_path, "pass", before=slow_start, between=0.4)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    off = "watchdog = Watchdog(Path('x'), 0, HealthConfig(hang_factor=None, hang_minutes=0.001), last_words=say)"
    done = watched(tmp_path, "time.sleep(0.6)", before=off)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
