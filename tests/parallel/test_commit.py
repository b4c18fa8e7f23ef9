"""The lock of a run's checkpoints, where there is flock and where there is none."""

import errno
import fcntl
import json
import os
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest

from models.checkpoint import CheckpointError
from parallel.commit import OWNER, prepare

NO_LOCKS = "this file system has no flock"


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def no_flock(request):
    """A file system on which flock says that it has none."""
    with mock.patch.object(fcntl, "flock", side_effect=OSError(request.param, os.strerror(request.param))):
        yield


def owner_file(directory: Path, **content: object) -> Path:
    directory.mkdir()
    (directory / OWNER).write_text(json.dumps(content))
    return directory / OWNER


def test_without_flock_a_file_keeps_others_out(no_flock, tmp_path):
    with ExitStack() as guard:
        with pytest.warns(UserWarning, match=rf"{tmp_path}: this file system has no flock .*{OWNER} takes its place"):
            prepare(tmp_path / ".step_1.partial", guard)
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
        with (
            ExitStack() as other,
            pytest.warns(UserWarning, match=NO_LOCKS),
            pytest.raises(
                CheckpointError, match=rf"process {os.getpid()} on .*, which still runs, since 0 minutes ago"
            ),
        ):
            prepare(tmp_path / ".step_2.partial", other)
        assert (tmp_path / ".step_1.partial").is_dir(), "who is kept out sweeps nothing"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
    with ExitStack() as guard, pytest.warns(UserWarning, match=NO_LOCKS):
        prepare(tmp_path / ".step_1.partial", guard)


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("content", "who"),
    [
        (
            {"host": socket.gethostname(), "pid": dead_process(), "time": 0.0},
            r", which runs no more, since \d+ minutes",
        ),
        ({"host": "elsewhere", "pid": 7, "time": 0.0}, r"process 7 on elsewhere, since \d+ minutes ago"),
        ({}, "a process that has not said which is saving here"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no flock")
def test_a_file_that_was_left_behind_is_reported_with_the_way_out(tmp_path, content, who):
    owner = owner_file(tmp_path / "run", **content)
    no_locks = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    with (
        mock.patch.object(fcntl, "flock", side_effect=no_locks),
        ExitStack() as guard,
        pytest.raises(CheckpointError, match=who) as caught,
    ):
        prepare(tmp_path / "run" / ".step_1.partial", guard)
    assert str(caught.value).endswith(f"once you know that no process saves here, remove {owner}")
    assert owner.exists()


def test_other_errors_of_flock_are_errors(tmp_path):
    with (
        mock.patch.object(fcntl, "flock", side_effect=OSError(errno.EIO, "disk")),
        ExitStack() as guard,
        pytest.raises(OSError, match="disk"),
    ):
        prepare(tmp_path / ".step_1.partial", guard)
    assert not (tmp_path / OWNER).exists()


def test_with_flock_no_file_is_left(tmp_path):
    with ExitStack() as guard:
        prepare(tmp_path / ".step_1.partial", guard)
        with ExitStack() as other, pytest.raises(CheckpointError, match="another process is saving here"):
            prepare(tmp_path / ".step_2.partial", other)
        assert not (tmp_path / OWNER).exists()
