"""Saves that fail: one error on all ranks, and older checkpoints as they were."""

import contextlib
import errno
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from models.checkpoint import CheckpointError, latest_good, list_checkpoints, verify
from parallel.grid import Grid
from tests.parallel.saving import names, refused, save
from tests.parallel.tiny import tiny_engine


@contextlib.contextmanager
def no_file_beyond(num_bytes: int):
    """Writing more to a file fails in this process, as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_through_faults(grid: Grid, directory: Path) -> list[str]:
    """Saves step 1, fails at step 2 in several ways, saves step 3."""
    engine = tiny_engine(grid, zero_stage=1)
    save(engine, directory, 1)
    obstacle = directory.parent / "file"
    obstacle.touch()
    messages = []
    with no_file_beyond(4096) if grid.rank == 1 else contextlib.nullcontext():
        messages.append(refused(lambda: save(engine, directory, 2)))
    messages.append(refused(lambda: save(engine, directory, 2, tokenizer_path=directory / "absent.model")))
    messages.append(refused(lambda: save(engine, obstacle / "run", 2)))
    messages.append(" ".join(path.name for path in directory.glob(".step_*")))
    dist.barrier()  # the next save sweeps: first all look
    save(engine, directory, 3)
    return messages


def test_a_failed_save_is_told_to_all_ranks_and_leaves_no_trace(ranks, tmp_path):
    directory = tmp_path / "run"
    first, second = ranks(2).run(save_through_faults, directory=directory, timeout=60)
    assert first == second
    too_large, no_tokenizer, no_directory, left = first
    final = directory / "step_00000002"
    for message in (too_large, no_tokenizer):
        assert message.startswith(f"{final}: not saved: ")
        assert "older checkpoints are intact" in message
    assert os.strerror(errno.EFBIG) in too_large
    assert "rank 1" in too_large
    assert "absent.model" in no_tokenizer
    assert "rank 0" in no_tokenizer
    assert os.strerror(errno.ENOTDIR) in no_directory
    assert left == ""
    assert names(directory) == ["latest", "step_00000001", "step_00000003"]
    for path in list_checkpoints(directory):
        verify(path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def save_until_full(grid: Grid, directory: Path) -> str:
    engine = tiny_engine(grid, zero_stage=1)
    try:
        for step in range(1, 10):
            save(engine, directory, step, keep={"keep_last": 10})
    except CheckpointError as error:
        return str(error)
    return "never full"


def remount(directory: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(directory)], check=True)


def test_a_full_and_a_read_only_disk_are_one_clear_error(ranks, small_disk):
    first, second = ranks(2).run(save_until_full, directory=small_disk, timeout=60)
    assert first == second
    assert os.strerror(errno.ENOSPC) in first
    good, skipped = latest_good(small_disk)
    assert good == list_checkpoints(small_disk)[-1]
    assert not skipped
    assert not list(small_disk.glob(".step_*"))

    remount(small_disk, "ro")
    first, second = ranks(2).run(save_until_full, directory=small_disk, timeout=60)
    remount(small_disk, "rw")
    assert first == second
    assert os.strerror(errno.EROFS) in first
    assert latest_good(small_disk) == (good, [])
