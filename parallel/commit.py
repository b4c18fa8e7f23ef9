"""Makes a checkpoint appear whole or not at all. Everything here runs on one rank, in a directory it has to itself."""

import json
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from models.checkpoint import (
    FORMAT_VERSION,
    MANIFEST,
    CheckpointError,
    describe_file,
    list_checkpoints,
    read_meta,
    step_of,
)

REPLACED = ".replaced"
"""The end of a checkpoint's name while another one takes its place."""


def stage(staging: Path) -> None:
    """Makes an empty directory to write into, and removes what killed saves left behind."""
    staging.parent.mkdir(parents=True, exist_ok=True)
    if staging.exists():
        shutil.rmtree(staging)
    sweep(staging.parent)
    staging.mkdir()


def sweep(directory: Path) -> list[str]:
    """Removes what is no checkpoint; returns what could not be removed, and why."""
    problems = []
    for path in directory.glob(".step_*"):
        try:
            shutil.rmtree(path)
        except OSError as error:
            problems.append(f"{path} cannot be removed: {error.strerror}")
    return problems


def give_back(directory: Path) -> None:
    """Gives a checkpoint its name again that made way for another one of its step, which a kill kept from coming."""
    for path in directory.glob(f".step_*{REPLACED}"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(REPLACED))
        if not final.exists():
            with suppress(OSError):  # where nothing can be written, nothing will be swept away either
                path.rename(final)


def write_rest(staging: Path, contents: dict[str, bytes], files: dict[str, dict[str, Any]]) -> None:
    """Writes what is no tensor, and last the manifest over all files.

    Args:
        staging: where the tensors are.
        contents: by file name.
        files: the manifest's entries of the files that are already there.
    """
    for name, content in contents.items():
        _write_synced(staging / name, content)
    files = files | {name: describe_file(staging / name) for name in contents}
    manifest = {"format_version": FORMAT_VERSION, "files": files}
    _write_synced(staging / MANIFEST, json.dumps(manifest, indent=1).encode())
    _sync_directory(staging)


def publish(staging: Path, final: Path) -> None:
    """Gives the checkpoint its name and lets `latest` point at it.

    One of the same step makes way: the run did not continue from it, so it was damaged or belongs to another course.
    """
    if final.exists():
        final.rename(final.with_name(f".{final.name}{REPLACED}"))
    staging.rename(final)
    _sync_directory(final.parent)
    _point(final.parent, "latest", final)


def retire(directory: Path, *, step: int, keep_last: int, keep_every: int | None, keep_best: bool) -> list[str]:
    """Points `best` at the checkpoint of the lowest validation loss and removes those that nothing keeps.

    Each leaves its name first, so that none is ever half there.

    Args:
        directory: of the run's checkpoints.
        step: of the newest. Those beyond it belong to a course that the run left when it continued from an earlier one.
        keep_last: number of newest checkpoints that stay.
        keep_every: multiples of this step stay for good.
        keep_best: the one that `best` points at stays.

    Returns:
        What could not be removed, and why.
    """
    steps = {step_of(path): path for path in list_checkpoints(directory)}
    candidates = sorted(number for number in steps if number <= step)
    kept = set(candidates[-keep_last:])
    kept |= {number for number in candidates if keep_every and number % keep_every == 0}
    best = _best([steps[number] for number in candidates]) if keep_best else None
    if best is not None:
        kept.add(step_of(best))
        _point(directory, "best", best)
    else:
        (directory / "best").unlink(missing_ok=True)
    for number in steps.keys() - kept:
        steps[number].rename(directory / f".{steps[number].name}.retired")
    return sweep(directory)


def _best(paths: list[Path]) -> Path | None:
    """The lowest validation loss, of equal ones the later; None if no checkpoint has one.

    Losses over different numbers of tokens do not compare: those like the newest one's count.
    """
    losses = {}
    for path in paths:
        try:
            found = read_meta(path).get("validation")
            if found is not None and math.isfinite(loss := float(found["loss"])):
                losses[path] = (loss, int(found["tokens"]))
        except (CheckpointError, TypeError, KeyError, ValueError):
            continue  # damaged: whoever reads it is told
    if not losses:
        return None
    *_, (_, tokens) = losses.values()
    return min((path for path in reversed(losses) if losses[path][1] == tokens), key=lambda path: losses[path][0])


def _point(directory: Path, name: str, target: Path) -> None:
    """Makes or moves a link in one step."""
    link = directory / f".{name}"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(directory / name)
    _sync_directory(directory)


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
