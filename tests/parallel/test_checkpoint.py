"""Continuing from checkpoints: the state to the bit, on other ranks to rounding, and refusals that all ranks share."""

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.checkpoint import (
    INDEX,
    KINDS,
    MANIFEST,
    describe_file,
    list_checkpoints,
    tensor_file,
    tensor_key,
)
from parallel.grid import Grid
from tests.parallel.saving import names, refused, save, save_steps
from tests.parallel.tiny import tiny_engine, tiny_model, train
from tests.test_no_code import planted

BEFORE, AFTER = range(3), range(3, 6)
STAGES = (0, 1, 2)


def everything(engine: Any) -> dict[str, Tensor]:
    """The whole training state, and the weights the model computes with."""
    state = engine.state
    tensors = {tensor_key(kind, name): state.gather(name, kind).clone() for name in state.names for kind in KINDS}
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
    ("size", "pairs"),
    [
        (1, [(0, 1), (2, 0)]),
        (2, [(0, 2), (1, 0), (2, 1)]),
        pytest.param(4, [(1, 1), (2, 0), (0, 2)], marks=pytest.mark.slow),
    ],
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


def load_into(grid: Grid, path: Path, width: int = 16, layers: tuple[str, ...] | None = None) -> tuple[str, bool]:
    """What loading is refused with, and whether the engine is unchanged then."""
    from parallel.checkpoint import load_checkpoint

    model = tiny_model(width=width, layers=layers) if layers else tiny_model(seed=2)
    engine = tiny_engine(grid, zero_stage=1, model=model)
    before = everything(engine)
    message = refused(lambda: load_checkpoint(engine, path))
    after = everything(engine)
    return message, all(torch.equal(before[key], after[key]) for key in before)


def test_another_model_is_refused_and_nothing_is_changed(ranks, saved):
    path = saved[0] / "1" / "step_00000003"
    for message, unchanged in ranks(2).run(load_into, path=path, width=24, layers=("rglru", "local_attention")):
        assert unchanged
        assert message.startswith(f"{path}: a checkpoint of another model: missing blocks.1.mixer.q_proj.weight")
        assert "embed.weight [61, 16] instead of [61, 24]" in message
        assert message.count("embed.weight") == 1


def rewrite(path: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a JSON file of a checkpoint and its entry in the manifest."""
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = describe_file(path / name)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_without_the_optimizers_state_training_does_not_continue(ranks, tmp_path):
    ranks(2).run(save_steps, directory=tmp_path, steps=[1])
    path = tmp_path / "step_00000001"
    rewrite(path, INDEX, lambda index: index.pop("optimizer.exp_avg_sq.embed.weight"))
    for message, unchanged in ranks(2).run(load_into, path=path):
        assert unchanged
        assert message.startswith(
            f"{path}: training cannot continue from it, it lacks optimizer.exp_avg_sq.embed.weight; continue from one"
        )


def load_planted(grid: Grid, directory: Path, trace: Path) -> list[str]:
    """What training says of a checkpoint with a pickle in the place of one file after the other, under a manifest that
    agrees; a state of random number generators is in the tensors of each rank."""
    from parallel.checkpoint import find_checkpoint, load_checkpoint

    path, engine, messages = directory / "step_00000001", tiny_engine(grid, zero_stage=1), []
    for name, content in itertools.product(sorted(names(path)), planted(trace)):
        kept, manifest = (path / name).read_bytes(), (path / MANIFEST).read_bytes()
        (path / name).write_bytes(content)
        if name != MANIFEST:
            entries = json.loads(manifest)
            entries["files"][name] = describe_file(path / name)
            (path / MANIFEST).write_text(json.dumps(entries))
        find_checkpoint(grid, directory)
        messages.append(refused(lambda: load_checkpoint(engine, path)))
        (path / MANIFEST).write_bytes(manifest)
        (path / name).write_bytes(kept)
    load_checkpoint(engine, path)
    return messages


def test_continuing_runs_no_code_of_the_checkpoint(ranks, tmp_path):
    ranks(1).run(save_steps, directory=tmp_path / "run", steps=[1])
    (messages,) = ranks(1).run(load_planted, directory=tmp_path / "run", trace=tmp_path / "trace")
    refusals = [message for message in messages if not message.startswith("no error: ")]
    assert len(messages) == 3 * 5
    assert len(refusals) == 3 * 4, "config.yaml is for the reader alone"
    assert not (tmp_path / "trace").exists()


def read_with_trouble(grid: Grid, directory: Path) -> tuple[tuple[Path | None, list[str]], list[str], dict[str, Any]]:
    """The second rank lists one checkpoint less and cannot read meta.json; the lead cannot list."""
    from parallel import checkpoint

    engine = tiny_engine(grid, zero_stage=1)
    path = directory / "step_00000002"

    def on(rank: int, name: str, replacement: Callable[..., Any]) -> Any:
        return mock.patch.object(checkpoint, name, replacement) if grid.rank == rank else contextlib.nullcontext()

    def fail(*_: Any) -> None:
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
    with on(1, "read_parameters", fail):
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
    found, (not_listed, not_read, incomplete, no_tensors, damaged), progress = first
    assert found == (tmp_path / "step_00000002", [])
    assert not_listed.startswith("rank 0: OSError")
    assert not_read.startswith("rank 1: OSError")
    assert no_tensors.startswith("rank 1: OSError")
    assert "meta.json: has no model, progress, num_updates, ranks; continue from one that train.py wrote" in incomplete
    assert "sha256" in damaged
    assert progress == {"consumed_samples": 8, "step": 2}


def test_each_rank_writes_its_share(saved):
    path = saved[0] / "1" / "step_00000003"
    sizes = [(path / tensor_file(rank)).stat().st_size for rank in range(2)]
    assert min(sizes) > 0.8 * max(sizes)
