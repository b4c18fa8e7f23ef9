"""An exported directory that brings its own modelling files, in a process that has neither Rondo nor kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import models.hf.remote
from data.tokenizer import Tokenizer
from eval.generate import generate
from eval.sampling import Sampling
from models.checkpoint import read_weights
from models.hf.export import export
from models.hf.formats import KEPT_IN_FP32
from models.hf.importing import import_directory
from models.hf.remote_process import RemoteModel
from models.lm import LM
from models.restore import read_config
from tests.models.griffin import griffin, write_run
from tests.models.stacks import STACKS, stack_config

TOKENIZER = Path(__file__).parents[1] / "assets" / "tokenizer.model"
TEXTS = ("def f(x):\n    return x\n", "x", "import os, sys  # both\n" * 9)

USE = """
import pathlib, sys, torch

sys.modules.update(dict.fromkeys(("fla", "flash_attn", "models", "ops")))  # as if none were installed
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

directory, answer, texts = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
assert not any((pathlib.Path(p) / "models" / "lm.py").exists() for p in sys.path), "Rondo can be imported"
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
batch = tokenizer(texts, return_tensors="pt", padding=True)
greedy = {"max_new_tokens": 8, "do_sample": False}

def trained(model):
    model.zero_grad()
    model(**batch, labels=batch.input_ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}

copy = directory.with_name("copy")
model.save_pretrained(copy)
again = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
first = trained(model)
second, third = trained(again), trained(model)  # ops of both are known to torch at once
model.train().gradient_checkpointing_enable()
fourth = trained(model)
model.eval().gradient_checkpointing_disable()
with torch.no_grad():
    rough = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.bfloat16)
    torch.save({
        "class": type(model).__name__,
        "copied": type(again) is not type(model),
        "alike": all(torch.equal(g, other[n]) for n, g in first.items() for other in (second, third, fourth)),
        "config": AutoConfig.from_pretrained(directory, trust_remote_code=True).num_hidden_layers,
        "ids": batch.input_ids,
        "logits": model(**batch).logits,
        "generated": model.generate(**batch, **greedy)[:, batch.input_ids.shape[1]:],
        "beams": again.generate(**batch, **greedy, num_beams=3)[:, batch.input_ids.shape[1]:],
        "rough": rough(**batch).logits,
        "rough_generated": rough.generate(**batch, **greedy)[:, batch.input_ids.shape[1]:],
        "dtypes": {name: str(p.dtype) for name, p in rough.named_parameters()},
        "modules": [name for name in sys.modules if name.startswith(("models.", "ops.", "fla."))],
    }, answer)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, LM]:
    """A run, its directory, its model."""
    root = tmp_path_factory.mktemp("rondo")
    lm = griffin(stack_config(STACKS["all"], vocab_size=416)).eval()
    run = write_run(root / "run", lm, TOKENIZER)
    agreement = export(run, root / "hf", TEXTS, max_shard_bytes=30_000)
    assert agreement.relative_difference <= 1e-6
    assert agreement.generated_tokens == 16
    assert "without Rondo" in agreement.how
    return run, root / "hf", lm


@torch.no_grad()
def test_a_process_without_rondo_uses_it(exported: tuple[Path, Path, LM], tmp_path: Path) -> None:
    _, directory, lm = exported
    script, answer = tmp_path / "use.py", tmp_path / "answer.pt"
    script.write_text(USE, encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", str(script), str(directory), str(answer), *TEXTS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = torch.load(answer, weights_only=True)
    assert found["class"] == "RondoForCausalLM"
    assert found["copied"]
    assert found["alike"]
    assert found["modules"] == []
    assert found["config"] == len(STACKS["all"])
    tokenizer = Tokenizer(TOKENIZER)
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in TEXTS]
    longest = max(len(row) for row in rows)
    for i, row in enumerate(rows):
        assert found["ids"][i].tolist() == [tokenizer.pad_id] * (longest - len(row)) + row
        wanted = lm(torch.tensor([row]), torch.arange(len(row))[None])[0][0]
        own = slice(longest - len(row), None)
        assert (found["logits"][i, own] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert (found["rough"][i, own] - wanted).norm() <= 0.2 * wanted.norm()
    greedy = Sampling(max_tokens=8, temperature=0.0)
    for i, row in enumerate(generate(lm, rows, greedy, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)):
        assert found["generated"][i, : len(row)].tolist() == row
    assert found["beams"].max() < tokenizer.vocab_size
    assert found["rough_generated"].shape == found["generated"].shape
    kept = {name for name, dtype in found["dtypes"].items() if dtype == "torch.float32"}
    assert {name for name in found["dtypes"] if name.endswith(KEPT_IN_FP32)} <= kept
    assert found["dtypes"]["model.blocks.0.mlp.up.weight"] == "torch.bfloat16"


def test_the_directory_is_whole(exported: tuple[Path, Path, LM]) -> None:
    _, directory, lm = exported
    config = json.loads((directory / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_rondo.RondoForCausalLM"
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 1
    stored = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    assert stored.keys() == {f"model.{name}" for name, _ in lm.named_parameters()}
    card = (directory / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("hf", trust_remote_code=True)' in card
    assert 'AutoTokenizer.from_pretrained("hf", trust_remote_code=True)' in card
    assert "in a process without Rondo" in card


def test_it_comes_back_to_the_bit_and_runs_none_of_its_code(
    exported: tuple[Path, Path, LM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory, lm = exported

    def refuse(*args: Any) -> None:
        raise AssertionError("the directory's code would run")

    monkeypatch.setattr(RemoteModel, "__init__", refuse)
    import_directory(directory, tmp_path / "back")
    weights = read_weights(tmp_path / "back")
    assert weights.keys() == dict(lm.named_parameters()).keys()
    assert all(torch.equal(weights[name], parameter) for name, parameter in lm.named_parameters())
    assert read_config(tmp_path / "back") == lm.config


@pytest.mark.slow
def test_files_of_another_function_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = griffin(stack_config(STACKS["rglru"], vocab_size=416)).eval()
    run = write_run(tmp_path / "run", lm, TOKENIZER)
    honest = models.hf.remote.flatten

    def wrong(config: Any) -> dict[str, str]:
        files = honest(config)
        files["models__block.py"] = files["models__block.py"].replace("return x + self.mlp(", "return x - self.mlp(")
        return files

    monkeypatch.setattr(models.hf.remote, "flatten", wrong)
    with pytest.raises(ValueError, match="not written, because as RondoForCausalLM logits differ"):
        export(run, tmp_path / "hf", format_name="rondo")
    assert not (tmp_path / "hf").exists()
    assert list(tmp_path.glob(".hf*")) == []


@pytest.mark.slow
def test_a_directory_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"its process ended: .*model_type"):
        RemoteModel(tmp_path).logits(torch.zeros(1, 1, dtype=torch.int64))
