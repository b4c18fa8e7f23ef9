"""Files of weights: how they are divided, what an export of 14B parameters will write, and what it holds in memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.hf.__main__ import main
from models.hf.formats import Stored
from models.hf.weights import open_weights, parse_size, plan_files, write_weights

ROOT = Path(__file__).resolve().parents[2]

MEASURE = """
import json, resource, sys, torch
from pathlib import Path
from models.hf.__main__ import main
from models.hf.export import DTYPES
from models.hf.plan import plan_export
from models.hf.registry import choose
from models.hf.formats import TokenIds
from models.hf.weights import parameter_shapes, write_weights, plan_files
from models.init import parameter_generator
from tests.models.test_hgrn2 import config
import dataclasses
import models.write_checkpoint
import fla.ops.gla.naive
from transformers import GenerationConfig

directory, phase = Path(sys.argv[1]), sys.argv[2]
wide = dataclasses.replace(config(), vocab_size=16384, width=1024, layers=("hgrn2",) * 2)
wide = dataclasses.replace(wide, mlp=dataclasses.replace(wide.mlp, width=3072))
shapes = parameter_shapes(wide)
stored = choose(wide)
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if phase == "make":
    def draw(name):
        return torch.empty(shapes[name]).normal_(0, 0.02, generator=parameter_generator(0, name))
    (directory / "hf").mkdir()
    files = plan_files(stored.tensors(wide, shapes), torch.float32, 64 << 20)
    write_weights(directory / "hf", files, torch.float32, draw)
    (directory / "hf" / "config.json").write_text(json.dumps(stored.config_json(wide, TokenIds())))
    raise SystemExit
before = peak()
if phase == "import":
    models.write_checkpoint.FILE_BYTES = 32 << 20
    assert main(["import", str(directory / "hf"), str(directory / "ckpt"), "--no-check"]) == 0
else:
    shard = ["--max-shard-size", "64MB", "--no-tokenizer"]
    assert main(["export", str(directory / "ckpt"), str(directory / "out"), *shard]) == 0
plan = plan_export(wide, stored, DTYPES["float32"], 64 * 10**6)
print(json.dumps({"grown": peak() - before, "copy": 4 * wide.num_params(), "planned": plan.peak}))
"""


def tensor(name: str, *shape: int, rows: tuple[int, int] | None = None, source: str | None = None) -> Stored:
    return Stored(name=name, source=source or name, shape=shape, rows=rows)


@pytest.mark.parametrize(
    ("limit", "files"),
    [(400, [["a"], ["b", "c"], ["d"]]), (10**9, [["a", "b", "c", "d"]]), (1, [["a"], ["b"], ["c"], ["d"]])],
)
def test_files_fill_up_in_order(limit: int, files: list[list[str]]) -> None:
    tensors = [tensor("a", 200), tensor("b", 60), tensor("c", 40), tensor("d", 1)]
    found = plan_files(tensors, torch.float32, limit)
    assert [[t.name for t in file.tensors] for file in found] == files
    assert sum(file.num_bytes for file in found) == 4 * 301
    count = len(files)
    expected = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert [file.name for file in found] == (["model.safetensors"] if count == 1 else expected)


def test_a_parameter_in_parts_over_two_files(tmp_path: Path) -> None:
    """Read anew for the second file, cut at the right rows, decays in fp32 whatever the rest is."""
    whole = {"x.conv.weight": torch.arange(24.0).view(8, 3) / 7, "x.A_log": torch.tensor([1 / 3])}
    tensors = [
        tensor("q", 2, 1, 3, rows=(0, 2), source="x.conv.weight"),
        tensor("k", 6, 1, 3, rows=(2, 8), source="x.conv.weight"),
        tensor("A_log", 1, source="x.A_log"),
    ]
    files = plan_files(tensors, torch.bfloat16, 12)
    assert [file.num_bytes for file in files] == [12, 36, 4]
    write_weights(tmp_path, files, torch.bfloat16, whole.__getitem__)
    found = open_weights(tmp_path)
    assert found.dtypes == {"q": "BF16", "k": "BF16", "A_log": "F32"}
    assert torch.equal(found.read("q"), whole["x.conv.weight"][:2].view(2, 1, 3).bfloat16())
    assert torch.equal(found.read("k"), whole["x.conv.weight"][2:].view(6, 1, 3).bfloat16())
    assert torch.equal(found.read("A_log"), whole["x.A_log"])


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    files = plan_files([tensor("a", 2)], torch.float32, 100)
    with pytest.raises(OSError, match=r"absent/model\.safetensors"):
        write_weights(tmp_path / "absent", files, torch.float32, lambda name: torch.zeros(2))


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("700", 700), ("10kB", 10_000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "5GiB", "-1MB", "five"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"--max-shard-size: .*5GB"):
        parse_size(text)


def test_the_plan_of_14b_parameters_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "griffin_14b.yaml")
    assert main(["export", config, "--plan", "--dtype", "bfloat16", "--max-shard-size", "4GB"]) == 0
    out = capsys.readouterr().out
    parameters = int(re.match(r"([\d,]+) parameters as RecurrentGemmaForCausalLM", out)[1].replace(",", ""))
    assert 13e9 < parameters < 15e9
    sizes = [float(size) for size in re.findall(r"model-\S+safetensors +([\d.]+) GB", out)]
    assert len(sizes) == 8
    assert all(size <= 4 for size in sizes)
    assert sum(sizes) == pytest.approx(2e-9 * parameters, rel=1e-3)
    peak = float(re.search(r"peak memory ([\d.]+) GB", out)[1])
    assert 4e-9 * parameters < peak < 4.3e-9 * parameters, "one fp32 copy and little else"
    assert main(["export", config, "--plan", "--format", "olmo_hybrid"]) == 1
    assert "model.logit_soft_cap: 30.0; OlmoHybrid needs null" in capsys.readouterr().err


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Peak memory of an import and an export over what the process had before, each in a process of its own."""
    import json

    directory = tmp_path_factory.mktemp("memory")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    found = {}
    for phase in ("make", "import", "export"):
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, str(directory), phase],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        if phase != "make":
            found[phase] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_an_import_holds_some_tensors_only(grown: dict[str, dict[str, int]]) -> None:
    assert grown["import"]["grown"] < 0.75 * grown["import"]["copy"]


@pytest.mark.slow
def test_an_export_holds_one_copy(grown: dict[str, dict[str, int]]) -> None:
    """What the plan says, within a tenth of a copy."""
    export = grown["export"]
    assert export["grown"] < export["planned"] + 0.1 * export["copy"]
