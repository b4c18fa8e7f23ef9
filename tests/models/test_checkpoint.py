import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from models.checkpoint import (
    CONFIG,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    META,
    CheckpointError,
    describe_file,
    iter_tensors,
    latest_good,
    list_checkpoints,
    load_weights,
    read_meta,
    read_parameters,
    read_weights,
    require_parameters,
    tensor_file,
    verify,
    write_tensors,
)
from models.restore import resolve_checkpoint
from tests.parallel.saving import save_steps
from tests.parallel.tiny import tiny_model

SHARD = tensor_file(0)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    ranks(2).run(save_steps, directory=directory, steps=[10, 20])
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
    key = "optimizer.exp_avg_sq.embed.weight"
    assert torch.equal(dict(iter_tensors(saved / "latest", [key]))[key], torch.zeros(61, 16))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.absent'"):
        dict(iter_tensors(saved / "latest", ["model.absent"]))


def test_torchs_distributed_checkpoint_reads_it(saved):
    """With its own reader of safetensors: the names are the ones it finds."""
    expected = read_weights(saved / "latest")
    tensors = {f"model.{name}": torch.empty_like(weight) for name, weight in expected.items()}
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(saved / "step_00000020")), no_dist=True)
    assert all(torch.equal(tensors[f"model.{name}"], expected[name]) for name in expected)


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


def write_another_version(path: Path, version: str) -> None:
    path.write_text(path.read_text().replace('"format_version": 2', f'"format_version": {version}'))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (SHARD, truncate, "bytes instead of"),
        (SHARD, flip_a_bit, "sha256"),
        (SHARD, Path.unlink, "No such file"),
        (INDEX, flip_a_bit, "sha256"),
        (META, flip_a_bit, "sha256"),
        (MANIFEST, truncate, "manifest.json"),
        (MANIFEST, Path.unlink, "has no manifest.json: it was not written to its end"),
        (MANIFEST, partial(write_another_version, version="3"), "format_version 3; this Rondo reads 2; update Rondo"),
        (
            MANIFEST,
            partial(write_another_version, version="1"),
            "format_version 1; this Rondo reads 2; use the Rondo that",
        ),
        (MANIFEST, partial(write_another_version, version='"2"'), "format_version '2'; this Rondo reads 2"),
        (MANIFEST, partial(write_another_version, version="2.0"), "format_version 2.0; this Rondo reads 2"),
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
    (copy / "step_00000020" / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION} | content))
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
    (copy / "latest" / META).write_text(json.dumps({"format_version": FORMAT_VERSION}))
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


def rewrite(path: Path, name: str, content: bytes) -> None:
    """Puts `content` in a file's place, under a manifest that agrees."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = describe_file(path / name)
    (path / MANIFEST).write_text(json.dumps(manifest))


class Intruder:
    """A pickle of it creates a directory when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [MANIFEST, META, INDEX, CONFIG, SHARD, tensor_file(1), ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["pickle", "torch"])
def test_reading_runs_no_code_of_the_checkpoint(copy, tmp_path, name, wrapped):
    """Everything that reads a checkpoint, with a pickle in each file's place and the checksums of it."""
    path, trace = copy / "step_00000020", tmp_path / "trace"
    planted = tmp_path / "planted"
    (torch.save if wrapped else pickle_to)(Intruder(trace), planted)
    if name == MANIFEST:
        (path / name).write_bytes(planted.read_bytes())
    else:
        rewrite(path, name, planted.read_bytes())
    for read in (verify, read_meta, read_weights, resolve_checkpoint, lambda path: load_weights(path, tiny_model())):
        with contextlib.suppress(CheckpointError):
            read(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Intruder(trace)))
    assert trace.exists(), "a pickle that is read leaves the trace"


def pickle_to(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def test_a_checkpoint_names_files_of_its_own_alone(copy, tmp_path):
    path = copy / "step_00000020"
    write_tensors(tmp_path / "elsewhere.safetensors", {"model.embed.weight": torch.ones(61, 16)})
    index = json.loads((path / INDEX).read_text())
    for name in ("../../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"), ".."):
        rewrite(path, INDEX, json.dumps(index | {"model.embed.weight": name}).encode())
        with pytest.raises(CheckpointError, match="which is no file of its own"):
            read_weights(path)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["../step_00000010/meta.json"] = describe_file(copy / "step_00000010" / META)
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="which is no file of its own"):
        verify(path)


def replace_embedding(tensor: torch.Tensor) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        write_tensors(path / "other.safetensors", {"model.embed.weight": tensor})
        index = json.loads((path / INDEX).read_text())
        rewrite(path, INDEX, json.dumps(index | {"model.embed.weight": "other.safetensors"}).encode())

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_embedding(torch.ones(16, 61)), r"model\.embed\.weight is torch\.float32 \[16, 61\] instead of torch"),
        (replace_embedding(torch.ones(61, 16).double()), r"model\.embed\.weight is torch\.float64 \[61, 16\] instead"),
        (lambda path: rewrite(path, SHARD, b"no tensors"), "tensors cannot be read"),
        (lambda path: rewrite(path, INDEX, b"[]"), "index.json: holds no mapping"),
        (lambda path: rewrite(path, INDEX, b'{"model.embed.weight": 3}'), "does not map tensors to files"),
        (lambda path: rewrite(path, INDEX, b"[" * 100_000), "index.json: "),
        (lambda path: rewrite(path, META, b'{"format_version": 2, "parameters": {"embed.weight": 7}}'), "no mapping"),
    ],
)  # fmt: skip
def test_what_fits_the_checksums_but_not_the_format_is_one_clear_error(copy, change, message):
    path = copy / "step_00000020"
    change(path)
    verify(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        dict(read_parameters(path, [("weight", "embed.weight")]))
    assert str(caught.value).endswith("use another checkpoint")


def test_a_manifest_that_leaves_out_what_is_needed_is_damage(copy):
    manifest = json.loads((copy / "latest" / MANIFEST).read_text())
    for name in (META, INDEX):
        files = {key: entry for key, entry in manifest["files"].items() if key != name}
        (copy / "latest" / MANIFEST).write_text(json.dumps(manifest | {"files": files}))
        with pytest.raises(CheckpointError, match=f"does not list {name}"):
            verify(copy / "latest")


def test_what_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="absent"):
        write_tensors(tmp_path / "absent" / "file", {"a": torch.ones(1)})


READING = r"""
import re, sys, torch
from pathlib import Path
from models.checkpoint import load_weights
from torch import nn

def peak_mb():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

model = nn.Module()
for number in range(8):
    model.register_parameter(f"p{number}", nn.Parameter(torch.zeros(4 << 20)))
before = peak_mb()
load_weights(Path(sys.argv[1]), model)
print(before, peak_mb())
assert all(p[-1] == number for number, p in enumerate(model.parameters()))
"""


def test_reading_takes_no_second_copy_of_the_model(tmp_path):
    """128 MB of weights and as much in each moment: what reading adds to a built model is a tensor of 16 MB."""
    tensors = {f"model.p{number}": torch.full((4 << 20,), float(number)) for number in range(8)}
    moments = {key.replace("model", "optimizer.exp_avg"): tensor * 2 for key, tensor in tensors.items()}
    write_tensors(tmp_path / SHARD, tensors | moments)
    (tmp_path / INDEX).write_text(json.dumps(dict.fromkeys(tensors | moments, SHARD)))
    shapes = {key.removeprefix("model."): [4 << 20] for key in tensors}
    (tmp_path / META).write_text(json.dumps({"format_version": FORMAT_VERSION, "parameters": shapes}))
    files = {name: describe_file(tmp_path / name) for name in (SHARD, INDEX, META)}
    (tmp_path / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, "files": files}))
    done = subprocess.run([sys.executable, "-c", READING, str(tmp_path)], capture_output=True, text=True, check=True)
    before, after = (float(word) for word in done.stdout.split())
    assert after - before < 48
