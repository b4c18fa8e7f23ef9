import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.checkpoint import CheckpointError, latest_good, list_checkpoints, read_meta, verify
from parallel.grid import Grid
from tests.parallel.launch import Ranks
from tests.parallel.tiny import tiny_engine, tiny_model, train

BEFORE, AFTER = range(3), range(3, 6)
STAGES = (0, 1, 2)


def save(engine: Any, directory: Path, step: int, **overrides: Any) -> Path:
    from parallel.checkpoint import save_checkpoint

    arguments: dict[str, Any] = {
        "progress": {"consumed_samples": 4 * step},
        "config_yaml": "name: tiny\n",
        "environment": {"torch": torch.__version__},
        "tokenizer_path": None,
        "keep_last": 3,
        "keep_every": None,
    }
    return save_checkpoint(engine, directory, step=step, **arguments | overrides)


def everything(engine: Any) -> dict[str, Tensor]:
    """The whole training state, and the weights the model computes with."""
    from models.checkpoint import KINDS, tensor_key

    state = engine.state
    tensors = {tensor_key(kind, name): state.gather(name, kind).clone() for name in state.parameters for kind in KINDS}
    return tensors | {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


Course = tuple[list[tuple], dict[str, Tensor]]


def save_and_go_on(grid: Grid, directory: Path) -> dict[int, Course]:
    """Each ZeRO stage trains, saves below its own name, and trains on."""
    courses = {}
    for stage in STAGES:
        engine = tiny_engine(grid, zero_stage=stage)
        train(engine, BEFORE)
        torch.manual_seed(grid.rank)
        save(engine, directory / str(stage), step=BEFORE.stop)
        courses[stage] = (train(engine, AFTER), everything(engine))
    return courses


def resume(grid: Grid, directory: Path, pairs: list[tuple[int, int]]) -> dict[tuple[int, int], Course]:
    """For each (stage that saved, stage that loads): trains on from the checkpoint, starting with other weights."""
    from parallel.checkpoint import find_checkpoint, load_checkpoint

    courses = {}
    for saved, loads in pairs:
        engine = tiny_engine(grid, zero_stage=loads, model=tiny_model(seed=1))
        path, skipped = find_checkpoint(grid, directory / str(saved))
        progress = load_checkpoint(engine, path)
        assert not skipped
        assert progress == {"consumed_samples": 12, "step": 3}
        courses[saved, loads] = (train(engine, AFTER), everything(engine))
    return courses


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> tuple[Path, list[dict[int, Course]]]:
    directory = tmp_path_factory.mktemp("saved")
    return directory, ranks(2).run(save_and_go_on, directory=directory)


def test_resuming_equals_not_stopping_to_the_bit(ranks, saved):
    directory, without_stop = saved
    resumed = ranks(2).run(resume, directory=directory, pairs=[(stage, stage) for stage in STAGES])
    for expected, courses in zip(without_stop, resumed, strict=True):
        for stage in STAGES:
            (results, tensors), (expected_results, expected_tensors) = courses[stage, stage], expected[stage]
            assert results == expected_results
            assert tensors.keys() == expected_tensors.keys()
            assert all(torch.equal(tensors[key], expected_tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("size", "pairs"), [(1, [(0, 1), (2, 0)]), (2, [(0, 2), (1, 0), (2, 1)]), (4, [(1, 1), (2, 0), (0, 2)])]
)
def test_other_ranks_and_stages_continue_the_same_curve(ranks, saved, size, pairs):
    directory, without_stop = saved
    for courses in ranks(size).run(resume, directory=directory, pairs=pairs):
        for (saved_stage, _), (results, tensors) in courses.items():
            expected_results, expected_tensors = without_stop[0][saved_stage]
            torch.testing.assert_close(torch.tensor(results), torch.tensor(expected_results), rtol=1e-5, atol=0.0)
            torch.testing.assert_close(tensors, expected_tensors, rtol=1e-4, atol=1e-6)


def draw_after_loading(grid: Grid, directory: Path) -> Tensor:
    from parallel.checkpoint import load_checkpoint

    torch.manual_seed(99)
    load_checkpoint(tiny_engine(grid, zero_stage=1), directory / "1" / "latest")
    return torch.rand(3)


def test_random_numbers_continue_on_each_rank(ranks, saved):
    expected = [torch.rand(3, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    for drawn, wanted in zip(ranks(2).run(draw_after_loading, directory=saved[0]), expected, strict=True):
        assert torch.equal(drawn, wanted)


def test_each_rank_writes_its_share(saved):
    path = saved[0] / "1" / "step_00000003"
    sizes = [(path / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert min(sizes) > 0.8 * max(sizes)


def load_into_another_model(grid: Grid, path: Path) -> tuple[str, bool]:
    from parallel.checkpoint import load_checkpoint

    engine = tiny_engine(grid, zero_stage=1, model=tiny_model(width=24, layers=("rglru", "local_attention")))
    before = everything(engine)
    try:
        load_checkpoint(engine, path)
    except CheckpointError as error:
        after = everything(engine)
        return str(error), all(torch.equal(before[key], after[key]) for key in before)
    return "loaded", False


def test_another_model_is_refused_and_nothing_is_changed(ranks, saved):
    path = saved[0] / "1" / "step_00000003"
    for message, unchanged in ranks(2).run(load_into_another_model, path=path):
        assert unchanged
        assert message.startswith(f"{path}: a checkpoint of another model: missing blocks.1.mixer.q_proj.weight")
        assert "embed.weight [61, 16] instead of [61, 24]" in message
        assert message.count("embed.weight") == 1


def save_steps(grid: Grid, directory: Path, steps: list[int], **overrides: Any) -> None:
    """A checkpoint a step, of an untrained engine."""
    engine = tiny_engine(grid, zero_stage=1)
    for step in steps:
        save(engine, directory, step, **overrides)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_retention_keeps_the_last_and_every_nth(ranks, tmp_path):
    ranks(2).run(save_steps, directory=tmp_path, steps=[1, 2, 3, 4, 5, 6, 7], keep_last=2, keep_every=3)
    kept = ["step_00000003", "step_00000006", "step_00000007"]
    assert names(tmp_path) == [".lock", "latest", *kept]
    assert os.readlink(tmp_path / "latest") == "step_00000007"


def test_saving_an_earlier_step_leaves_the_abandoned_course(ranks, tmp_path):
    ranks(2).run(save_steps, directory=tmp_path, steps=[2, 4, 6, 3, 3], keep_last=3)
    assert names(tmp_path) == [".lock", "latest", "step_00000002", "step_00000003"]
    assert os.readlink(tmp_path / "latest") == "step_00000003"
    assert latest_good(tmp_path) == (tmp_path / "step_00000003", [])


def test_a_checkpoint_stands_alone(ranks, tmp_path):
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(b"pieces")
    ranks(2).run(save_steps, directory=tmp_path / "run", steps=[5], tokenizer_path=tokenizer)
    path = tmp_path / "run" / "step_00000005"
    assert (path / "tokenizer.model").read_bytes() == b"pieces"
    assert (path / "config.yaml").read_text() == "name: tiny\n"
    meta = read_meta(path)
    assert meta["step"] == 5
    assert meta["progress"] == {"consumed_samples": 20}
    assert meta["environment"] == {"torch": torch.__version__}
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert {*files, "manifest.json"} == set(names(path))


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
    messages = []
    obstacle = directory.parent / "file"
    obstacle.touch()
    lock = (directory / ".lock").open()
    for where, fault, overrides in (
        (directory, no_file_beyond(4096) if grid.rank == 1 else contextlib.nullcontext(), {}),
        (directory, contextlib.nullcontext(), {"tokenizer_path": directory / "absent.model"}),
        (obstacle / "run", contextlib.nullcontext(), {}),
        (directory, lock, {}),
    ):
        if fault is lock and grid.is_lead:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (directory / ".step_00000002.partial").mkdir()
        with fault:
            try:
                save(engine, where, 2, **overrides)
                messages.append("saved")
            except CheckpointError as error:
                messages.append(str(error))
    messages.append(" ".join(path.name for path in directory.glob(".step_*")))
    dist.barrier()  # the next save sweeps: first all look
    save(engine, directory, 3)
    return messages


def test_a_failed_save_is_told_to_all_ranks_and_leaves_no_trace(ranks, tmp_path):
    directory = tmp_path / "run"
    first, second = ranks(2).run(save_through_faults, directory=directory, timeout=60)
    assert first == second
    too_large, no_tokenizer, no_directory, locked, left = first
    final = directory / "step_00000002"
    for message in (too_large, no_tokenizer, locked):
        assert message.startswith(f"{final}: not saved: ")
        assert "older checkpoints are intact" in message
    assert os.strerror(errno.EFBIG) in too_large
    assert "rank 1" in too_large
    assert "absent.model" in no_tokenizer
    assert "rank 0" in no_tokenizer
    assert os.strerror(errno.ENOTDIR) in no_directory
    assert "another process is saving here" in locked
    assert left == ".step_00000002.partial", "what another process writes is not ours to remove"
    assert names(directory) == [".lock", "latest", "step_00000001", "step_00000003"]
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


def save_on_a_full_disk(grid: Grid, directory: Path) -> list[str]:
    """In step 2 the disk is full for the second rank's tensors, then for the lead's files; steps 1 and 3 are saved."""
    from torch.distributed.checkpoint import FileSystemWriter

    from parallel import commit

    engine = tiny_engine(grid, zero_stage=1)
    save(engine, directory, 1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    messages = []
    for rank, owner, name in ((1, FileSystemWriter, "write_data"), (0, commit, "_write_synced")):
        patched = mock.patch.object(owner, name, side_effect=full) if grid.rank == rank else contextlib.nullcontext()
        with patched:
            try:
                save(engine, directory, 2)
                messages.append("saved")
            except CheckpointError as error:
                messages.append(str(error))
        dist.barrier()  # the next save sweeps: first all look
        messages += [path.name for path in directory.glob(".step_*")]
        dist.barrier()
    save(engine, directory, 3)
    return messages


def test_a_disk_that_is_full_for_one_rank_is_one_clear_error(ranks, tmp_path):
    first, second = ranks(2).run(save_on_a_full_disk, directory=tmp_path, timeout=60)
    assert first == second
    for rank, message in zip((1, 0), first, strict=True):
        assert message.startswith(f"{tmp_path / 'step_00000002'}: not saved: rank {rank}: ")
        assert os.strerror(errno.ENOSPC) in message
    assert names(tmp_path) == [".lock", "latest", "step_00000001", "step_00000003"]
    assert latest_good(tmp_path) == (tmp_path / "step_00000003", [])


def refused(action: Callable[[], Any]) -> str:
    try:
        return f"no error: {action()}"
    except CheckpointError as error:
        return str(error)


def read_with_trouble(grid: Grid, directory: Path) -> tuple[tuple[Path | None, list[str]], list[str], dict[str, Any]]:
    """The second rank lists one checkpoint less and cannot read meta.json; the lead cannot list."""
    from parallel import checkpoint

    engine = tiny_engine(grid, zero_stage=1)
    path = directory / "step_00000002"

    def on(rank: int, name: str, replacement: Callable[..., Any]) -> Any:
        return mock.patch.object(checkpoint, name, replacement) if grid.rank == rank else contextlib.nullcontext()

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with on(1, "list_checkpoints", lambda directory: list_checkpoints(directory)[:-1]):
        found = checkpoint.find_checkpoint(grid, directory)
    messages = []
    with on(0, "list_checkpoints", fail):
        messages.append(refused(lambda: checkpoint.find_checkpoint(grid, directory)))
    with on(1, "read_meta", fail):
        messages.append(refused(lambda: checkpoint.load_checkpoint(engine, path)))
    with on(1, "read_meta", lambda path: {"step": 2}):
        messages.append(refused(lambda: checkpoint.load_checkpoint(engine, path)))
    if grid.is_lead:
        (path / "config.yaml").write_text("name: tony\n")  # damage that only hashing shows
    dist.barrier()
    messages.append(refused(lambda: checkpoint.load_checkpoint(engine, path)))
    return found, messages, checkpoint.load_checkpoint(engine, path, verified=True)


def test_ranks_agree_on_what_they_read(ranks, tmp_path):
    ranks(2).run(save_steps, directory=tmp_path, steps=[1, 2])
    first, second = ranks(2).run(read_with_trouble, directory=tmp_path, timeout=60)
    assert first == second
    found, (not_listed, not_read, incomplete, damaged), progress = first
    assert found == (tmp_path / "step_00000002", [])
    assert not_listed.startswith("rank 0: OSError")
    assert not_read.startswith("rank 1: OSError")
    assert "meta.json: has no progress, num_updates, ranks; continue from one that train.py wrote" in incomplete
    assert "sha256" in damaged
    assert progress == {"consumed_samples": 8, "step": 2}


def save_until_full(grid: Grid, directory: Path) -> str:
    engine = tiny_engine(grid, zero_stage=1)
    try:
        for step in range(1, 10):
            save(engine, directory, step, keep_last=10)
    except CheckpointError as error:
        return str(error)
    return "never full"


def test_a_full_disk_is_one_clear_error(ranks, small_disk):
    first, second = ranks(2).run(save_until_full, directory=small_disk, timeout=60)
    assert first == second
    assert os.strerror(errno.ENOSPC) in first
    good, skipped = latest_good(small_disk)
    assert good == list_checkpoints(small_disk)[-1]
    assert not skipped
    assert not list(small_disk.glob(".step_*"))
    shutil.rmtree(good)


def test_a_killed_save_leaves_the_older_checkpoint(ranks, tmp_path):
    """The ranks are killed between tensors and manifest: a pipe in the tokenizer's place holds the save up there."""
    ranks(2).run(save_steps, directory=tmp_path, steps=[1])
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    victims = Ranks(2)
    victims.start(save_steps, directory=tmp_path, steps=[2], tokenizer_path=pipe)
    partial = tmp_path / ".step_00000002.partial"
    deadline = time.monotonic() + 60
    while not (partial / "__1_0.distcp").exists() or not (partial / ".metadata").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    victims.close()

    assert partial.is_dir()
    assert latest_good(tmp_path) == (tmp_path / "step_00000001", [])
    assert os.readlink(tmp_path / "latest") == "step_00000001"
    ranks(2).run(save_steps, directory=tmp_path, steps=[2])
    assert names(tmp_path) == [".lock", "latest", "pipe", "step_00000001", "step_00000002"]
