"""What an import refuses: one error that names what is wrong, nothing run, nothing left behind."""

import dataclasses
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import Tokenizer
from models.hf.__main__ import main
from models.hf.fla_models import HGRN2
from models.hf.formats import TokenIds
from models.hf.weights import plan_files, write_weights
from models.lm import LM
from tests.models.test_hgrn2 import config

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests" / "assets" / "tokenizer.model"
Change = Callable[[Path], None]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small HGRN2, written without its library."""
    path = tmp_path / "published"
    path.mkdir()
    settings = config()
    weights = {name: p.detach() for name, p in LM(settings).named_parameters()}
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    files = plan_files(HGRN2.tensors(settings, shapes), torch.float32, 20_000)
    assert len(files) > 1
    write_weights(path, files, torch.float32, weights.__getitem__)
    (path / "config.json").write_text(json.dumps(HGRN2.config_json(settings, TokenIds())))
    return path


def settings(**changes: Any) -> Change:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """All in one file, after `edit`."""

    def change(directory: Path) -> None:
        held: dict[str, torch.Tensor] = {}
        for path in sorted(directory.glob("*.safetensors")):
            held |= load_file(path)
            path.unlink()
        (directory / "model.safetensors.index.json").unlink()
        edit(held)
        save_file(held, directory / "model.safetensors")

    return change


class Malicious:
    def __reduce__(self) -> tuple:
        return Path.write_text, (Path("pwned"), "")


def pickled(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))


def remote_code(directory: Path) -> None:
    settings(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}, model_type="evil")(directory)
    (directory / "modeling_evil.py").write_text("open('pwned', 'w')")


def tokenizer(directory: Path) -> None:
    (directory / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())


def other_special_tokens(directory: Path) -> None:
    tokenizer(directory)
    held = Tokenizer(TOKENIZER)
    edit = tensors(
        lambda w: w.update(
            {name: torch.zeros(held.vocab_size, 32) for name in ("model.embeddings.weight", "lm_head.weight")}
        )
    )
    edit(directory)
    settings(vocab_size=held.vocab_size, eos_token_id=[held.eos_id + 1])(directory)


def cut_short(directory: Path) -> None:
    path = sorted(directory.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-7])


FAULTS: dict[str, tuple[Change, str]] = {
    "unknown type": (settings(model_type="hgrn3"), r"model_type: 'hgrn3'; Rondo imports .*; did you mean hgrn2\?"),
    "no type": (settings(model_type=None), "model_type: None; Rondo imports recurrent_gemma, olmo_hybrid, hgrn2"),
    "remote code": (remote_code, "model_type: 'evil'; Rondo imports"),
    "a pickle": (
        pickled,
        r"weights are pickles \(pytorch_model.bin\), which run code .*only safetensors are read: fetch",
    ),
    "missing": (
        tensors(lambda w: [w.pop("model.layers.1.attn.q_proj.weight"), w.pop("model.norm.weight")]),
        r"missing: model.layers.1.attn.q_proj.weight, model.norm.weight; take the config.json and the weights from one",
    ),
    "extra": (
        tensors(lambda w: w.update({"model.layers.0.attn.g_proj.weight": torch.zeros(2)})),
        "not of a HGRN2ForCausalLM: model.layers.0.attn.g_proj.weight;",
    ),
    "shape": (
        tensors(lambda w: w.update({"model.lower_bounds": torch.zeros(3, 31)})),
        r"of another shape: model.lower_bounds \[3, 31\] instead of \[3, 32\];",
    ),
    "dtype": (
        tensors(lambda w: w.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)})),
        "in none of the dtypes F32, BF16, F16: model.norm.weight I8;",
    ),
    "vocabulary": (
        settings(vocab_size=64),
        r"model.embeddings.weight \[61, 32\] instead of \[64, 32\], lm_head.weight",
    ),
    "untied": (
        tensors(lambda w: w.pop("lm_head.weight")),
        "missing: lm_head.weight; set tie_word_embeddings to true if the head is the embedding",
    ),
    "tied": (
        settings(tie_word_embeddings=True),
        "ties the head to the embedding, but lm_head.weight and model.embeddings.weight differ; set tie_word_emb",
    ),
    "quantized": (settings(quantization_config={"bits": 4}), "quantization_config: given, but only weights in F32"),
    "attention": (settings(attn={"layers": [1], "num_heads": 2}), "attn: .*only with null: no attention layers"),
    "activation": (settings(hidden_act="gelu"), "hidden_act: gelu; Rondo has this model only with swish"),
    "heads": (settings(hidden_size=30, expand_ratio=4), r"heads: 7; must divide the model's width \(30\)"),
    "a word for a number": (settings(num_hidden_layers="three"), "config.json: is no HGRN2ForCausalLM's"),
    "no json": (lambda d: (d / "config.json").write_text("{") and None, "config.json: cannot be read"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file; name a directory"),
    "no weights": (
        lambda d: [path.unlink() for path in d.glob("model*")] and None,
        "holds neither model.safetensors nor model.safetensors.index.json",
    ),
    "a file missing": (
        lambda d: sorted(d.glob("*.safetensors"))[1].unlink(),
        "its index names model-00002-of-0000..safetensors, which it lacks; fetch these files",
    ),
    "a file outside": (
        lambda d: (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x"}})) and None,
        "names '../x', which is no file of this directory",
    ),
    "cut short": (cut_short, "cannot be read .*; fetch the file again"),
    "large tokenizer": (
        tokenizer,
        "pieces, but the model 61 rows; put the model's own tokenizer there, or import with",
    ),
    "special tokens": (other_special_tokens, r"its eos_token_id is 1, but config.json says \[2\]; put the model's own"),
    "no tokenizer": (
        lambda d: (d / "tokenizer.model").write_text("no model") and None,
        "not a SentencePiece model.*or import with --no-tokenizer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_clear_error_and_nothing_left(
    fault: str, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FAULTS[fault]
    change(directory)
    target = directory.parent / "out" / "checkpoint"
    monkeypatch.chdir(directory.parent)
    assert main(["import", str(directory), str(target), "--no-check"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("models.hf: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (directory.parent / "out").exists()
    assert not (directory.parent / "pwned").exists()


def test_a_target_in_use(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = directory.parent / "checkpoint"
    target.mkdir()
    (target / "mine").write_text("precious")
    assert main(["import", str(directory), str(target), "--no-check"]) == 1
    assert "exists and is not an empty directory" in capsys.readouterr().err
    (target / "mine").unlink()
    (directory.parent / "checkpoint.yaml").write_text("precious")
    assert main(["import", str(directory), str(target), "--no-check"]) == 1
    assert "checkpoint.yaml: exists" in capsys.readouterr().err
    assert (directory.parent / "checkpoint.yaml").read_text() == "precious"


def test_a_foreign_tokenizer_may_be_left_out(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer(directory)
    target = directory.parent / "checkpoint"
    assert main(["import", str(directory), str(target), "--no-check", "--no-tokenizer"]) == 0
    out = capsys.readouterr().out
    assert "not compared with its class" in out
    assert "train on .bin/.idx corpora whose ids the model's own tokenizer made" in out
    assert not (target / "tokenizer.model").exists()


def test_a_tied_head_that_is_stored_as_well(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors(lambda w: w.update({"lm_head.weight": w["model.embeddings.weight"].clone()}))(directory)
    settings(tie_word_embeddings=True)(directory)
    assert main(["import", str(directory), str(directory.parent / "checkpoint"), "--no-check"]) == 0
    assert f"{LM(dataclasses.replace(config(), tie_embeddings=True)).num_params():,}" in capsys.readouterr().out


def test_an_import_that_differs_from_its_class_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mutant: layers with the bounds of their neighbours."""
    from models.hf import importing

    honest = importing.assemble

    def mutant(*arguments: Any) -> LM:
        model = honest(*arguments)
        model.shared["hgrn2"].lower_bounds.data = model.shared["hgrn2"].lower_bounds.flip(0) + 1.0 * torch.eye(3, 32)
        return model

    monkeypatch.setattr(importing, "assemble", mutant)
    assert main(["import", str(directory), str(directory.parent / "checkpoint")]) == 1
    assert "not imported, because as HGRN2ForCausalLM logits differ" in capsys.readouterr().err
    assert not (directory.parent / "checkpoint").exists()
