"""A lock file that says who holds it: for what one process at a time may write to."""

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What flock says on a file system that has none, for example Lustre mounted without `flock`."""


class LockError(ValueError):
    """Somebody else holds the lock.

    Attributes:
        job: the Slurm job of the holder; None if it has none or has not said.
    """

    def __init__(self, message: str, job: str | None = None) -> None:
        super().__init__(message)
        self.job = job


def hold(lock: Path, guard: ExitStack, *, doing: str) -> None:
    """Holds `lock` until `guard` closes or the process ends, however it does.

    The file tells host, process, job and time of its holder. Where the file system has no flock, a file beside it,
    `<lock>.owner`, takes its place; a killed process leaves that behind, and one of a process of this host that runs no
    more, or of an earlier start of this Slurm job, is taken over.

    Args:
        lock: in a directory that exists.
        doing: what the holder does, for the one that is kept out: "training".

    Raises:
        LockError: another process holds it.
    """
    file = guard.enter_context(_open_locked(lock, doing))
    if file is None:
        _create_owner(lock.with_name(f"{lock.name}.owner"), guard, doing)
        return
    guard.callback(file.truncate, 0)
    file.truncate(0)
    json.dump(_me(), file)
    file.flush()


class _Nothing:
    """Stands for the file where there is no flock to hold it by."""

    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def _open_locked(lock: Path, doing: str) -> Any:
    """The lock's file under an exclusive flock; a context that gives None where there is no flock."""
    while True:
        file: IO[str] = lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            content = file.read()
            file.close()
            raise LockError(
                f"{lock.parent}: {_describe(content)} is {doing} here; give each run its own directory", _job(content)
            ) from None
        except OSError as error:
            file.close()
            if error.errno not in NO_FLOCK:
                raise
            warnings.warn(
                f"{lock.parent}: this file system has no flock ({error.strerror}); {lock.name}.owner takes its place, "
                "and a process that is killed leaves it behind",
                stacklevel=4,
            )
            return _Nothing()
        if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            return file
        file.close()  # its holder removed it before this process had the lock


def _create_owner(owner: Path, guard: ExitStack, doing: str) -> None:
    """Creates the file that says who holds the lock, to be removed when `guard` closes."""
    try:
        file = owner.open("x")
    except FileExistsError:
        content = owner.read_text(errors="replace") if owner.exists() else ""
        if not _left_behind(content):
            raise LockError(
                f"{owner.parent}: {_describe(content)} is {doing} here, or was killed while it did; give each run its "
                f"own directory, or, once you know that no process is {doing} here, remove {owner}",
                _job(content),
            ) from None
        # Of two that find it, one takes it away, and both try again for the one name.
        owner.rename(owner.with_name(f"{owner.name}.{os.getpid()}"))
        owner.with_name(f"{owner.name}.{os.getpid()}").unlink()
        _create_owner(owner, guard, doing)
        return
    guard.callback(owner.unlink, missing_ok=True)
    with file:
        json.dump(_me(), file)


def _me() -> dict[str, Any]:
    """This process, as a lock names it."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "time": time.time(),
    }


def process_start(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks after boot; None if it is gone.

    Process numbers come again; number and start together do not until the next boot.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def _left_behind(content: str) -> bool:
    """Whether the process that wrote `content` is known to be gone."""
    try:
        owner = json.loads(content)
        host, pid, started = str(owner["host"]), int(owner["pid"]), owner["started"]
    except (ValueError, KeyError, TypeError):
        return False
    me = _me()
    if host == me["host"]:
        return started is not None and process_start(pid) != started
    same_job = me["job"] is not None and owner.get("job") == me["job"]
    return same_job and owner.get("restart") != me["restart"]  # Slurm ends a job's processes before it starts it anew


def _describe(content: str) -> str:
    """Who wrote the lock and how long ago."""
    try:
        owner = json.loads(content)
        host, pid = str(owner["host"]), int(owner["pid"])
        minutes = (time.time() - float(owner["time"])) / 60
    except (ValueError, KeyError, TypeError):
        return "a process that has not said which"
    job = f" of job {owner['job']}" if owner.get("job") else ""
    return f"process {pid} on {host}{job}, since {minutes:.0f} minutes ago,"


def _job(content: str) -> str | None:
    """The Slurm job of who wrote the lock."""
    try:
        job = json.loads(content)["job"]
    except (ValueError, KeyError, TypeError):
        return None
    return None if job is None else str(job)
