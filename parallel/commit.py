"""Makes a checkpoint appear whole or not at all. Everything here runs on one rank."""

import errno
import fcntl
import json
import os
import shutil
import socket
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from models.checkpoint import FORMAT_VERSION, MANIFEST, TOKENIZER, CheckpointError, describe_file, list_checkpoints

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What flock says on a file system that has none, for example Lustre mounted without `flock`."""

OWNER = ".lock.owner"


def prepare(staging: Path, guard: ExitStack) -> None:
    """Makes an empty directory to write into, and removes what killed saves left behind.

    The parent is locked: what lies there while the lock is free is written by nobody.

    Args:
        staging: where the checkpoint is written before it is published.
        guard: when it closes, the lock is given up, and `staging` removed if it was not published.

    Raises:
        CheckpointError: another process holds the lock.
    """
    directory = staging.parent
    directory.mkdir(parents=True, exist_ok=True)
    _lock(directory, guard)
    _sweep(directory)
    guard.callback(shutil.rmtree, staging, ignore_errors=True)
    staging.mkdir()


def _lock(directory: Path, guard: ExitStack) -> None:
    """Holds a lock that ends with the process, or where the file system has none, a file that may outlive it."""
    lock = guard.enter_context((directory / ".lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{directory}: another process is saving here; give each run its own directory") from None
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        owner = directory / OWNER
        warnings.warn(
            f"{directory}: this file system has no flock ({error.strerror}); {owner} takes its place, and a killed "
            "save leaves it behind",
            stacklevel=2,
        )
        _create_owner(owner, guard)


def _create_owner(owner: Path, guard: ExitStack) -> None:
    """Creates the file that says who is saving, to be removed when `guard` closes."""
    try:
        file = owner.open("x")
    except FileExistsError:
        raise CheckpointError(
            f"{owner.parent}: {_describe_owner(owner)} is saving here, or was killed while it did; give each run its "
            f"own directory, or, once you know that no process saves here, remove {owner}"
        ) from None
    guard.callback(owner.unlink, missing_ok=True)
    with file:
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}, file)


def _describe_owner(owner: Path) -> str:
    """Who wrote the file and how long ago; whether the process still runs, where it can be asked."""
    try:
        content = json.loads(owner.read_bytes())
        host, pid = str(content["host"]), int(content["pid"])
        minutes = (time.time() - float(content["time"])) / 60
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not said which"
    here = host == socket.gethostname()
    state = "" if not here else ", which still runs" if Path(f"/proc/{pid}").exists() else ", which runs no more"
    return f"process {pid} on {host}{state}, since {minutes:.0f} minutes ago,"


def _sweep(directory: Path) -> None:
    for path in directory.glob(".step_*"):
        shutil.rmtree(path)


def write_rest(
    staging: Path, contents: dict[str, bytes], tokenizer_path: Path | None, files: dict[str, dict[str, Any]]
) -> None:
    """Writes what is no tensor, and last the manifest over all files."""
    if tokenizer_path is not None:
        contents = contents | {TOKENIZER: tokenizer_path.read_bytes()}
    for name, content in contents.items():
        _write_synced(staging / name, content)
    files = files | {name: describe_file(staging / name) for name in (".metadata", *contents)}
    manifest = {"format_version": FORMAT_VERSION, "files": files}
    _write_synced(staging / MANIFEST, json.dumps(manifest, indent=1).encode())
    _sync_directory(staging)


def publish(staging: Path, final: Path) -> None:
    """Gives the checkpoint its name and lets `latest` point at it; one of the same step makes way."""
    if final.exists():
        final.rename(final.with_name(f".{final.name}.replaced"))
    staging.rename(final)
    _sync_directory(final.parent)
    link = final.with_name(".latest")
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(final.with_name("latest"))
    _sync_directory(final.parent)


def retire(directory: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Removes the checkpoints that nothing keeps; each leaves its name first, so that none is ever half there."""
    steps = {int(path.name.removeprefix("step_")): path for path in list_checkpoints(directory)}
    kept = set(sorted(number for number in steps if number <= step)[-keep_last:])
    kept |= {number for number in steps if keep_every and number <= step and number % keep_every == 0}
    for number in steps.keys() - kept:
        steps[number].rename(directory / f".{steps[number].name}.retired")
    _sweep(directory)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
