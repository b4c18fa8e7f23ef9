"""What a path that a user names turns into."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import models.checkpoint
from data.tokenizer import Tokenizer
from eval.load import load
from models.checkpoint import CheckpointError, describe_file
from models.config import ModelConfig
from models.lm import LM
from tests.models.griffin import griffin, griffin_config, write_run

TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "tokenizer.model"


@pytest.fixture(scope="module")
def model() -> LM:
    return griffin(spoken())


@pytest.fixture
def run(model: LM, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", model, TOKENIZER, step=10)


def spoken() -> ModelConfig:
    """As many rows as the tokenizer has pieces."""
    return griffin_config(vocab_size=Tokenizer(TOKENIZER).vocab_size)


def same_weights(a: LM, b: LM) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def rewrite(meta: Path, content: dict) -> None:
    """Another meta.json in an intact checkpoint."""
    meta.write_text(json.dumps(content))
    manifest = meta.with_name("manifest.json")
    files = json.loads(manifest.read_text())
    files["files"]["meta.json"] = describe_file(meta)
    manifest.write_text(json.dumps(files))


def test_a_run_and_its_checkpoint_give_the_same_model(run: Path, model: LM) -> None:
    for path in (run, run / "checkpoints" / "step_00000010"):
        loaded, tokenizer = load(path)
        assert loaded.config == model.config
        assert same_weights(loaded, model)
        assert tokenizer.vocab_size > 260
        assert not loaded.training


def test_a_run_gives_its_newest_intact_checkpoint(run: Path, model: LM, tmp_path: Path) -> None:
    later = write_run(tmp_path / "later", griffin(spoken(), seed=1), TOKENIZER, step=20)
    newest = run / "checkpoints" / "step_00000020"
    shutil.copytree(later / "checkpoints" / "step_00000020", newest)
    assert not same_weights(load(run)[0], model)
    with (newest / "tensors_00000.safetensors").open("r+b") as file:
        file.truncate(100)
    assert same_weights(load(run)[0], model)


@pytest.mark.parametrize("place", ["", "checkpoints/step_00000010"])
def test_every_file_is_hashed_once(run: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def describe(path: Path) -> dict:
        hashed.append(path.name)
        return describe_file(path)

    monkeypatch.setattr(models.checkpoint, "describe_file", describe)
    load(run / place)
    files = json.loads((run / "checkpoints" / "step_00000010" / "manifest.json").read_text())["files"]
    assert sorted(hashed) == sorted(files)


@pytest.mark.parametrize("name", ["tensors_00000.safetensors", "tokenizer.model"])
def test_a_damaged_checkpoint_is_refused(run: Path, name: str) -> None:
    file = run / "checkpoints" / "step_00000010" / name
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="its sha256 is not the manifest's"):
        load(file.parent)


def test_without_an_intact_checkpoint_every_reason_is_given(run: Path) -> None:
    (run / "checkpoints" / "step_00000010" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no intact checkpoint.*step_00000010.*no manifest\.json"):
        load(run)


def test_implementations_are_chosen_for_this_machine(run: Path, tmp_path: Path) -> None:
    """A model trained with a GPU's kernels is the same model here."""
    meta = run / "checkpoints" / "step_00000010" / "meta.json"
    content = json.loads(meta.read_text())
    content["model"]["impl"] = {"linear_scan": "triton"}
    rewrite(meta, content)
    assert load(run)[0].config.impl is None


def test_a_checkpoint_that_does_not_name_its_model(run: Path) -> None:
    meta = run / "checkpoints" / "step_00000010" / "meta.json"
    content = json.loads(meta.read_text())
    del content["model"]
    rewrite(meta, content)
    with pytest.raises(CheckpointError, match="has no model entry"):
        load(meta.parent)


def test_other_paths_are_named_for_what_they_are(tmp_path: Path, model: LM) -> None:
    with pytest.raises(ValueError, match="neither a run directory nor a checkpoint"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="Hugging Face directory"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer\.model"):
        load(write_run(tmp_path / "run", model, None))
