import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.checkpoint import (
    CheckpointError,
    describe_file,
    latest_good,
    list_checkpoints,
    load_weights,
    read_meta,
    read_tensors,
    read_weights,
    require_parameters,
    verify,
)
from parallel.grid import Grid
from tests.parallel.tiny import tiny_engine, tiny_model

SHARD, MANIFEST, META = "__0_0.distcp", "manifest.json", "meta.json"


def save_untrained(grid: Grid, directory: Path) -> None:
    from parallel.checkpoint import save_checkpoint

    engine = tiny_engine(grid, zero_stage=1)
    for step in (10, 20):
        save_checkpoint(
            engine,
            directory,
            step=step,
            progress={},
            config_yaml="name: tiny\n",
            environment={},
            tokenizer_path=None,
            keep_last=2,
            keep_every=None,
        )


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    ranks(2).run(save_untrained, directory=directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """Checkpoints of steps 10 and 20 that a test may damage."""
    return shutil.copytree(saved, tmp_path / "copy", symlinks=True)


def test_weights_are_the_parameters_by_name_and_tied_ones_once(saved):
    expected = dict(tiny_model().named_parameters())
    weights = read_weights(saved / "latest")
    assert weights.keys() == expected.keys()
    assert "head.weight" not in weights
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, expected[name])


def test_weights_go_into_a_model(saved):
    model = tiny_model(seed=3)
    load_weights(saved / "step_00000010", model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters(), strict=True))


def test_moments_are_stored_apart(saved):
    moment = read_tensors(saved / "latest", ["optimizer.exp_avg_sq.embed.weight"])
    assert torch.equal(moment["optimizer.exp_avg_sq.embed.weight"], torch.zeros(61, 16))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.absent'"):
        read_tensors(saved / "latest", ["model.absent"])


def test_reading_needs_no_deepspeed_and_no_process_group(saved):
    program = (
        "import sys, pathlib, torch.distributed as dist\n"
        "from models.checkpoint import read_weights\n"
        f"print(len(read_weights(pathlib.Path({str(saved / 'latest')!r}))))\n"
        "assert 'deepspeed' not in sys.modules and not dist.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(list(tiny_model().parameters()))
    assert "torch.distributed is disabled" not in done.stderr


def test_checkpoints_are_listed_by_step(tmp_path):
    for name in ("step_00000020", "step_100000000", "step_00000003", ".step_00000004.partial", "step_7", "samples"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000003", "step_00000020", "step_100000000"]
    assert list_checkpoints(tmp_path / "absent") == []
    assert latest_good(tmp_path / "absent") == (None, [])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write_another_version(path: Path) -> None:
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (SHARD, truncate, "bytes instead of"),
        (SHARD, flip_a_bit, "sha256"),
        (SHARD, Path.unlink, "No such file"),
        (".metadata", flip_a_bit, "sha256"),
        (META, flip_a_bit, "sha256"),
        (MANIFEST, truncate, "manifest.json"),
        (MANIFEST, Path.unlink, "has no manifest.json: it was not written to its end"),
        (MANIFEST, write_another_version, "format_version 2; this Rondo reads 1"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(copy, name, damage, reason):
    damage(copy / "step_00000020" / name)
    good, (skipped,) = latest_good(copy)
    assert good == copy / "step_00000010"
    assert skipped.startswith(str(copy / "step_00000020"))
    assert reason in skipped
    with pytest.raises(CheckpointError):
        read_weights(copy / "latest")


@pytest.mark.parametrize("content", [{}, {"files": ["meta.json"]}, {"files": {"meta.json": 7}}])
def test_a_manifest_without_files_is_damage(copy, content):
    (copy / "step_00000020" / MANIFEST).write_text(json.dumps({"format_version": 1} | content))
    good, (skipped,) = latest_good(copy)
    assert good == copy / "step_00000010"
    assert "has no mapping files of sizes and sha256; use another checkpoint" in skipped


def test_a_manifest_entry_without_size_is_damage(copy):
    manifest = json.loads((copy / "latest" / MANIFEST).read_text())
    manifest["files"][META] = {}
    (copy / "latest" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="bytes instead of None"):
        verify(copy / "latest")


def test_meta_without_parameters_is_damage(copy):
    (copy / "latest" / META).write_text(json.dumps({"format_version": 1}))
    for read in (lambda: read_weights(copy / "latest", verified=True), lambda: require_parameters(copy / "latest", {})):
        with pytest.raises(CheckpointError, match="has no mapping of parameters to shapes"):
            read()


def test_what_the_caller_has_verified_is_not_hashed_again(copy):
    expected = read_weights(copy / "latest")
    flip_a_bit(copy / "latest" / "config.yaml")  # damage that only hashing shows
    weights = read_weights(copy / "latest", verified=True)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    model = tiny_model(seed=3)
    load_weights(copy / "latest", model, verified=True)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    for read in (lambda: read_weights(copy / "latest"), lambda: load_weights(copy / "latest", model)):
        with pytest.raises(CheckpointError, match="sha256"):
            read()


def test_choosing_among_given_checkpoints_by_a_given_check(tmp_path):
    paths = [tmp_path / f"step_{step:08d}" for step in (1, 2, 3)]
    seen = []

    def refuse_the_last(path: Path) -> None:
        seen.append(path)
        if path == paths[2]:
            raise CheckpointError("torn")

    assert latest_good(tmp_path, paths=paths, verify=refuse_the_last) == (paths[1], ["torn"])
    assert seen == [paths[2], paths[1]]


def test_ranks_that_share_the_check_cover_every_file(copy):
    files = sorted(json.loads((copy / "latest" / MANIFEST).read_text())["files"])
    for damaged, name in enumerate(files):
        flip_a_bit(copy / "latest" / name)
        for part in range(3):
            if part == damaged % 3:
                with pytest.raises(CheckpointError, match="sha256"):
                    verify(copy / "latest", part=part, parts=3)
            else:
                verify(copy / "latest", part=part, parts=3)
        flip_a_bit(copy / "latest" / name)


def test_no_good_checkpoint_is_none(copy):
    for path in list_checkpoints(copy):
        truncate(path / META)
    good, skipped = latest_good(copy)
    assert good is None
    assert len(skipped) == 2


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint directory"):
        read_meta(tmp_path / "absent")


def test_other_parameters_are_named(saved):
    shapes = {name: parameter.shape for name, parameter in tiny_model().named_parameters()}
    require_parameters(saved / "latest", shapes)
    other = dict(shapes) | {"blocks.0.mixer.new": (2,), "head.norm.weight": (7,)}
    del other["embed.weight"]
    with pytest.raises(CheckpointError) as caught:
        require_parameters(saved / "latest", other)
    assert "missing blocks.0.mixer.new; not in the model embed.weight; " in str(caught.value)
    assert "of another shape head.norm.weight [16] instead of [7]; " in str(caught.value)
    with pytest.raises(CheckpointError, match=rf"and {len(shapes) - 8} more"):
        require_parameters(saved / "latest", {})


class Intruder:
    """A pickle of it creates a directory when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_reading_runs_no_code_of_the_checkpoint(copy, tmp_path):
    path = copy / "step_00000020"
    (path / ".metadata").write_bytes(pickle.dumps(Intruder(tmp_path / "trace")))
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][".metadata"] = describe_file(path / ".metadata")
    (path / MANIFEST).write_text(json.dumps(manifest))
    verify(path)
    with pytest.raises(CheckpointError, match=r"mkdir, which no checkpoint holds"):
        read_weights(path)
    assert not (tmp_path / "trace").exists()
