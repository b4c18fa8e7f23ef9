"""Writing checkpoints: what is kept, what training waits for, and what a failure in the background leaves."""

import contextlib
import errno
import json
import math
import os
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from models.checkpoint import latest_good, read_meta, read_weights, verify
from parallel.grid import Grid
from tests.parallel.saving import names, refused, save, save_steps, save_with
from tests.parallel.tiny import tiny_engine, train


def test_retention_keeps_the_last_and_every_nth(ranks, tmp_path):
    ranks(2).run(save_steps, directory=tmp_path, steps=[1, 2, 3, 4, 5, 6, 7], keep={"keep_last": 2, "keep_every": 3})
    assert names(tmp_path) == ["latest", "step_00000003", "step_00000006", "step_00000007"]
    assert os.readlink(tmp_path / "latest") == "step_00000007"


def test_saving_an_earlier_step_leaves_the_abandoned_course(ranks, tmp_path):
    ranks(2).run(save_steps, directory=tmp_path, steps=[2, 4, 6, 3, 3])
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000003"]
    assert os.readlink(tmp_path / "latest") == "step_00000003"
    assert latest_good(tmp_path) == (tmp_path / "step_00000003", [])


def save_validated(grid: Grid, directory: Path, losses: dict[int, tuple[float, int] | None], **keep: Any) -> list[str]:
    """A checkpoint a step with its validation loss and tokens; what `best` points at after each."""
    engine = tiny_engine(grid, zero_stage=1)
    best = []
    for step, validation in losses.items():
        result = None if validation is None else dict(zip(("loss", "tokens"), validation))
        save(engine, directory, step, validation=result, keep={"keep_last": 1} | keep)
        best.append(os.readlink(directory / "best")[-1] if (directory / "best").is_symlink() else "-")
    return best


def test_the_best_validation_is_kept_and_linked(ranks, tmp_path):
    losses = {
        1: None,
        2: (3.0, 64),
        3: (2.5, 64),
        4: None,
        5: (2.75, 64),
        6: (math.nan, 64),
        7: (9.0, 999),
        8: (2.0, 64),
    }
    best = ranks(1).run(save_validated, directory=tmp_path, losses=losses)[0]
    assert best == ["-", "2", "3", "3", "3", "3", "7", "8"], "7 is over other tokens: the earlier do not compare"
    assert names(tmp_path) == ["best", "latest", "step_00000008"]
    assert read_meta(tmp_path / "best")["validation"] == {"loss": 2.0, "tokens": 64}


def test_the_best_of_an_abandoned_course_goes_with_it(ranks, tmp_path):
    losses = {1: (3.0, 64), 4: (1.0, 64), 2: (2.0, 64)}
    assert ranks(1).run(save_validated, directory=tmp_path, losses=losses)[0] == ["1", "4", "2"]
    assert names(tmp_path) == ["best", "latest", "step_00000002"]
    ranks(1).run(save_validated, directory=tmp_path, losses={3: None}, keep_best=False)
    assert names(tmp_path) == ["latest", "step_00000003"]


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
    assert {file.stat().st_mode for file in path.iterdir()} == {(path / "meta.json").stat().st_mode}


def train_while_saving(grid: Grid, directory: Path) -> dict[str, Any]:
    """Saves step 2 while training goes on, the disk slow as long as a gate is shut."""
    from parallel import writer as module

    gate = threading.Event()
    write = module.write_tensors

    def write_slowly(*args: Any) -> None:
        assert gate.wait(60)
        write(*args)

    engine = tiny_engine(grid, zero_stage=0)  # which computes with the very tensors that are saved
    train(engine, range(2))
    state = engine.state
    before = {name: state.gather(name, "weight").clone() for name in state.names}
    found: dict[str, Any] = {}
    writer = module.CheckpointWriter(grid, directory, keep_last=3, asynchronous=True)
    with mock.patch.object(module, "write_tensors", write_slowly):
        save_with(writer, engine, 2)
        found["losses"] = train(engine, range(2, 5))
        found["early"] = writer.poll()
        found["while writing"] = names(directory)
        if grid.rank == 0:  # one rank is done, the other is not
            gate.set()
        found["half"] = [writer.poll() for _ in range(3)]
        threading.Timer(0.3, gate.set).start()
        save_with(writer, engine, 5)  # begins once the one before is complete
        found["when the next began"] = (tmp := directory / "step_00000002").is_dir() and not verify(tmp)
        found["saved"] = writer.poll() + writer.wait()
        with mock.patch.object(dist, "all_reduce", side_effect=AssertionError("idle ranks communicate")):
            found["idle"] = writer.poll()
    weights = read_weights(directory / "step_00000002")
    found["as it was"] = all(torch.equal(weights[name], before[name]) for name in before)
    after = {name: state.gather(name, "weight") for name in state.names}
    later = read_weights(directory / "step_00000005")
    found["as it became"] = all(torch.equal(later[name], after[name]) for name in after)
    found["moved"] = not torch.equal(after["embed.weight"], before["embed.weight"])
    return found


def plain_losses(grid: Grid) -> list[tuple]:
    return train(tiny_engine(grid, zero_stage=0), range(5))[2:]


def test_training_goes_on_while_a_checkpoint_is_written(ranks, tmp_path):
    undisturbed = ranks(2).run(plain_losses)
    for found, losses in zip(ranks(2).run(train_while_saving, directory=tmp_path), undisturbed, strict=True):
        assert found["losses"] == losses, "saving changes nothing in training"
        assert found["early"] == []
        assert found["while writing"] == [".step_00000002.partial"]
        assert found["half"] == [[], [], []]
        assert found["when the next began"], "no save starts before the one before it is complete"
        assert [saved.step for saved in found["saved"]] == [2, 5]
        assert found["idle"] == []
        assert found["as it was"], "what is written is the state when `save` was called"
        assert found["as it became"]
        assert found["moved"]
        first, second = found["saved"]
        assert first.stall < first.write_seconds, "which took as long as training did"
        assert second.stall >= 0.3, "waiting for the one before is the loop's time too"
        sizes = [json.loads((saved.path / "manifest.json").read_text())["files"] for saved in (first, second)]
        for saved, files in zip((first, second), sizes):
            stored = sum(entry["bytes"] for name, entry in files.items() if name.startswith("tensors_"))
            assert 0.5 * stored < saved.num_bytes <= stored, "the rest is the files' headers"
            assert f"training waited {saved.stall:.2f} s" in str(saved)


def save_without_copying(grid: Grid, directory: Path) -> bool:
    """Whether the checkpoint holds the state at the time of `save` where the copy to host memory is left out."""
    from parallel.snapshot import HostCopies

    with mock.patch.object(HostCopies, "_copy", lambda self, key, tensor: tensor):
        return train_while_saving(grid, directory)["as it was"]


def test_without_the_copy_training_writes_into_the_checkpoint(ranks, tmp_path):
    assert not any(ranks(2).run(save_without_copying, directory=tmp_path))


def fail_in_the_background(grid: Grid, directory: Path) -> list[Any]:
    """The second rank cannot write step 2, the lead cannot publish step 3 nor remove what step 4 replaces."""
    from parallel import commit
    from parallel import writer as module

    engine = tiny_engine(grid, zero_stage=1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    found: list[Any] = []
    writer = module.CheckpointWriter(grid, directory, keep_last=1, asynchronous=True)
    save_with(writer, engine, 1)
    writer.wait()
    for step, rank, name in ((2, 1, "write_tensors"), (3, 0, "publish")):
        patched = mock.patch.object(module, name, side_effect=full)
        with patched if grid.rank == rank else contextlib.nullcontext():
            save_with(writer, engine, step)
            found.append(refused(writer.wait))
        dist.barrier()  # the next save sweeps: first all look
        found += [path.name for path in directory.glob(".step_*")]
        dist.barrier()
    with mock.patch.object(commit, "shutil", mock.Mock(rmtree=mock.Mock(side_effect=full))):
        save_with(writer, engine, 4)
        (saved,) = writer.wait()
    found.append(saved.problems)
    save_with(writer, engine, 5)
    (saved,) = writer.wait()
    found.append(saved.problems)
    return found


def test_a_failure_in_the_background_is_told_to_all_ranks(ranks, tmp_path):
    first, second = ranks(2).run(fail_in_the_background, directory=tmp_path, timeout=60)
    assert first[:2] == second[:2]
    not_written, not_published, (problem,), none = first
    for message, step, rank in ((not_written, 2, 1), (not_published, 3, 0)):
        assert message.startswith(f"{tmp_path / f'step_{step:08d}'}: not saved: rank {rank}: OSError")
        assert os.strerror(errno.ENOSPC) in message
        assert "older checkpoints are intact" in message
    retired = tmp_path / ".step_00000001.retired"
    assert problem == f"{retired} cannot be removed: {os.strerror(errno.ENOSPC)}"
    assert none == ()
    assert names(tmp_path) == ["latest", "step_00000005"]
    verify(tmp_path / "latest")


def give_up(grid: Grid, directory: Path) -> None:
    """A writer is left while it saves step 1; another saves step 2."""
    from parallel import writer as module

    engine = tiny_engine(grid, zero_stage=1)
    gate = threading.Event()
    with mock.patch.object(module, "write_tensors", side_effect=lambda *_: gate.wait()):
        writer = module.CheckpointWriter(grid, directory, keep_last=3, asynchronous=True)
        save_with(writer, engine, 1)
        assert writer.poll() == []
    assert (directory / ".step_00000001.partial").is_dir()
    dist.barrier()
    save(engine, directory, 2)
    gate.set()


def test_a_save_that_is_given_up_leaves_nothing(ranks, tmp_path):
    ranks(2).run(give_up, directory=tmp_path)
    assert names(tmp_path) == ["latest", "step_00000002"]
