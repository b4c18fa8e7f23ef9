"""Makes a checkpoint appear whole or not at all. Everything here runs on one rank."""

import fcntl
import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from models.checkpoint import FORMAT_VERSION, MANIFEST, TOKENIZER, CheckpointError, describe_file, list_checkpoints


def prepare(staging: Path, guard: ExitStack) -> None:
    """Makes an empty directory to write into, and removes what killed saves left behind.

    The lock on the parent ends with the process that holds it: what lies there while it is free is written by nobody.

    Args:
        staging: where the checkpoint is written before it is published.
        guard: when it closes, the lock is given up, and `staging` removed if it was not published.

    Raises:
        CheckpointError: another process holds the lock.
    """
    directory = staging.parent
    directory.mkdir(parents=True, exist_ok=True)
    lock = guard.enter_context((directory / ".lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{directory}: another process is saving here; give each run its own directory") from None
    _sweep(directory)
    guard.callback(shutil.rmtree, staging, ignore_errors=True)
    staging.mkdir()


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
