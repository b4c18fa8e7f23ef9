"""The lock that says who holds it, between real processes, with flock and without."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest

from training.lock import LockError, hold, process_start

HOLD = """
import sys
from contextlib import ExitStack
from pathlib import Path
from training.lock import hold
with ExitStack() as guard:
    hold(Path(sys.argv[1]), guard, doing="training")
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def no_flock(request: pytest.FixtureRequest):
    """A file system on which flock says that it has none."""
    with (
        mock.patch.object(fcntl, "flock", side_effect=OSError(request.param, os.strerror(request.param))),
        pytest.warns(UserWarning, match=r"this file system has no flock .* \.lock\.owner takes its place"),
    ):
        yield


def holder(lock: Path) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    environment = os.environ | {"SLURM_JOB_ID": "4711"}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        cwd=root,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("killed", [True, False])
def test_one_at_a_time_and_free_once_the_process_is_gone(tmp_path: Path, killed: bool) -> None:
    lock = tmp_path / ".lock"
    other = holder(lock)
    content = lock.read_text()
    expected = (
        rf"{tmp_path}: process {other.pid} on {socket.gethostname()} of job 4711, since 0 minutes ago, is training"
    )
    with ExitStack() as guard, pytest.raises(LockError, match=expected):
        hold(lock, guard, doing="training")
    assert lock.read_text() == content, "who is kept out writes nothing"
    other.kill() if killed else other.communicate("\n")
    other.wait()
    with ExitStack() as guard:
        hold(lock, guard, doing="training")
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert lock.read_text() == ""


def test_a_lock_whose_file_was_removed_under_it_is_no_lock(tmp_path: Path) -> None:
    """Its holder removes it and leaves while another waits: both would hold different files of one name."""
    lock = tmp_path / ".lock"
    flock, removed = fcntl.flock, []

    def remove_once(file: object, operation: int) -> None:
        flock(file, operation)
        if not removed:
            removed.append(lock.unlink())

    with mock.patch.object(fcntl, "flock", side_effect=remove_once), ExitStack() as guard:
        hold(lock, guard, doing="training")
        with ExitStack() as other, pytest.raises(LockError):
            hold(lock, other, doing="training")


def test_without_flock_a_file_keeps_others_out(no_flock: None, tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    owner = tmp_path / ".lock.owner"
    with ExitStack() as guard:
        hold(lock, guard, doing="saving")
        with (
            ExitStack() as other,
            pytest.raises(LockError, match=rf"process {os.getpid()} on .* is saving here, or was"),
        ):
            hold(lock, other, doing="saving")
    assert not owner.exists()


def dead_process() -> tuple[int, int | None]:
    process = subprocess.Popen(["sleep", "60"])
    started = process_start(process.pid)
    process.kill()
    process.wait()
    return process.pid, started


def owner(**changes: object) -> dict[str, object]:
    pid, started = dead_process()
    dead = {"host": socket.gethostname(), "pid": pid, "started": started, "job": None, "restart": "0", "time": 0.0}
    return dead | changes


@pytest.mark.parametrize(
    "content",
    [
        owner(),
        owner(pid=os.getpid()),  # the number came again
        owner(host="elsewhere", job="4711"),  # an earlier start of this job
    ],
    ids=["gone", "number came again", "earlier start"],
)
def test_what_a_dead_process_left_behind_is_taken_over(
    no_flock: None, tmp_path: Path, content: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (tmp_path / ".lock.owner").write_text(json.dumps(content))
    with ExitStack() as guard:
        hold(tmp_path / ".lock", guard, doing="training")
        assert json.loads((tmp_path / ".lock.owner").read_text())["pid"] == os.getpid()
    assert sorted(os.listdir(tmp_path)) == [".lock"]


@pytest.mark.parametrize(
    ("content", "who"),
    [
        (owner(pid=os.getpid(), started=process_start(os.getpid())), rf"process {os.getpid()} on "),
        (owner(started=None), "process "),
        (owner(host="elsewhere", job="4712"), r"process \d+ on elsewhere of job 4712, since \d+ minutes ago,"),
        (owner(host="elsewhere", job="4711", restart="1"), "process "),
        ({}, "a process that has not said which"),
    ],
    ids=["running", "start unknown", "another job", "this start", "empty"],
)
def test_what_may_still_be_held_is_not(
    no_flock: None, tmp_path: Path, content: dict, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    path = tmp_path / ".lock.owner"
    path.write_text(json.dumps(content))
    with ExitStack() as guard, pytest.raises(LockError, match=who) as caught:
        hold(tmp_path / ".lock", guard, doing="training")
    assert str(caught.value).endswith(f"once you know that no process is training here, remove {path}")
    assert json.loads(path.read_text()) == content


def test_other_errors_of_flock_are_errors(tmp_path: Path) -> None:
    with (
        mock.patch.object(fcntl, "flock", side_effect=OSError(errno.EIO, "disk")),
        ExitStack() as guard,
        pytest.raises(OSError, match="disk"),
    ):
        hold(tmp_path / ".lock", guard, doing="training")
    assert not (tmp_path / ".lock.owner").exists()
