"""An exported directory: used by a process that has no Rondo, and refused where it would not be the same model."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import models.hf.export
import models.hf.verify
from data.tokenizer import Tokenizer, train_tokenizer
from models.hf.__main__ import main
from models.hf.export import _figures, export
from models.hf.formats import Stored
from models.lm import LM
from tests.models.griffin import griffin, griffin_config, padded_griffin, write_run

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    piece + "\n" for module in (textwrap, json, dataclasses) for piece in inspect.getsource(module).split("\n\n\n")
]
DIFFICULT = [
    "",
    " a  b   c\t\td\r\n\n\n  ",
    "<s> is a tag, </s> and <pad> too, <0x0A> is not a newline",
    "naïve café — 中文, 日本語, עברית, 😀, \u2581, e\u0301, \x00",
]
PROMPT = "def dumps(obj"

LOAD = """
import json, sys, pathlib, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, request = pathlib.Path(sys.argv[1]), json.loads(sys.stdin.read())
assert not any((pathlib.Path(p) / "models" / "lm.py").exists() for p in sys.path), "Rondo can be imported"
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory)
ids = [tokenizer(text).input_ids for text in request["texts"]]
prompt = tokenizer(request["prompt"], return_tensors="pt")
with torch.no_grad():
    logits = model(torch.tensor(request["tokens"])).logits
json.dump({
    "class": type(model).__name__,
    "ids": ids,
    "texts": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
    "logits": logits.tolist(),
    "generated": model.generate(**prompt, max_new_tokens=12, do_sample=False)[0].tolist(),
}, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, 500, path)
    return path


@pytest.fixture(scope="module")
def model() -> LM:
    return griffin(griffin_config(vocab_size=500))


@pytest.fixture(scope="module")
def run(model: LM, model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", model, model_file)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("export") / "parent" / "tiny"
    held_out = target.parent.parent / "held_out.txt"
    held_out.write_text(TEXTS[0])
    assert main(["export", str(run), str(target), "--text", str(held_out)]) == 0
    return target


@pytest.fixture(scope="module")
def elsewhere(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without the repository on its path makes of the directory."""
    directory = tmp_path_factory.mktemp("elsewhere")
    request = {"texts": [*TEXTS, *DIFFICULT], "prompt": PROMPT, "tokens": random_tokens().tolist()}
    subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(exported), str(directory / "answer.json")],
        input=json.dumps(request),
        text=True,
        cwd=directory,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=True,
    )
    return json.loads((directory / "answer.json").read_text())


def random_tokens() -> torch.Tensor:
    return torch.randint(500, (2, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: LM, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))[0]


@pytest.mark.slow
def test_logits_elsewhere(elsewhere: dict[str, Any], model: LM) -> None:
    assert elsewhere["class"] == "RecurrentGemmaForCausalLM"
    expected = logits_of(model, random_tokens())
    assert (torch.tensor(elsewhere["logits"]) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.slow
def test_every_text_elsewhere(elsewhere: dict[str, Any], model_file: Path) -> None:
    tokenizer = Tokenizer(model_file)
    texts = [*TEXTS, *DIFFICULT]
    assert len(texts) > 50
    assert elsewhere["ids"] == [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    assert elsewhere["texts"] == texts


@pytest.mark.slow
def test_generate_elsewhere(elsewhere: dict[str, Any], model: LM, model_file: Path) -> None:
    tokenizer = Tokenizer(model_file)
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    for _ in range(12):
        ids.append(int(logits_of(model, torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_id:
            break
    assert elsewhere["generated"] == ids


def test_files_and_card(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert [path.name for path in exported.parent.iterdir()] == ["tiny"], "nothing unfinished is left beside it"
    card = (exported / "README.md").read_text()
    for fact in (
        "| Training steps | 20 |",
        "| Training tokens | 20,000 |",
        "2.5000",
        "`0123456789abcdef`",
        "begin with `<s>`",
    ):
        assert fact in card, fact
    assert '"float32"' in (exported / "config.json").read_text()


def test_figures_are_those_of_the_step_whatever_else_the_metrics_hold(tmp_path: Path) -> None:
    rows = [
        {"step": 10, "tokens": 1000, "loss": 3.0},
        {"step": 10, "val_loss": 4.0, "val_bits_per_byte": None},
        {"step": 30, "tokens": 3000, "val_loss": 1.0},
        {"event": "resumed"},
        {"step": 20, "val_loss": 3.0},
        {"step": 10, "tokens": 1001},
        ["no row"],
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "", '{"step": 20, "tok']))
    assert _figures(tmp_path, 20) == {"tokens": 1001, "val_loss": 3.0}
    assert _figures(tmp_path / "absent", 20) == {}


def test_a_padded_vocabulary_is_exported_and_not_generated(model_file: Path, tmp_path: Path) -> None:
    """Twelve rows beyond the tokenizer are the likeliest everywhere."""
    model = padded_griffin(500, 12)
    export(write_run(tmp_path / "run", model, model_file), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    ids = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert theirs(ids).logits[0, -1].argmax() >= 500
    assert ids.max() < 500
    assert tokenizer.decode(ids[0], skip_special_tokens=True).startswith(PROMPT)
    assert tokenizer.decode([505]) == "", "what sampling without the generation config brings up"


def test_a_directory_in_use_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["export", str(run), str(tmp_path)]) == 1
    assert "exists and is not an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_text_that_is_none_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "image").write_bytes(b"\xff\xd8\xff")
    for name in ("image", "nothing"):
        assert main(["export", str(run), str(tmp_path / "out"), "--text", str(tmp_path / name)]) == 1
        assert f"--text: {tmp_path / name}; must be a text in UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "neither a run directory nor a checkpoint" in capsys.readouterr().err


def test_a_model_without_class_is_refused_with_every_key(model_file: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(griffin_config(vocab_size=500), logit_soft_cap=None, tie_embeddings=False)
    run = write_run(tmp_path / "run", griffin(config), model_file)
    with pytest.raises(ValueError, match=r"(?s)model\.tie_embeddings: false; .*model\.logit_soft_cap: null; "):
        export(run, tmp_path / "out", format_name="recurrentgemma")
    assert not (tmp_path / "out").exists()


def test_a_run_without_tokenizer_is_refused(model: LM, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", model, None)
    with pytest.raises(ValueError, match=r"has no tokenizer\.model"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("fault", ["weights", "tokenizer", "order of ids"])
def test_what_does_not_agree_is_not_left_behind(
    run: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The verification reads back what was written: one wrong weight, or another tokenizer, and nothing appears."""
    if fault == "weights":
        honest = Stored.cut

        def wrong(self: Stored, parameter: torch.Tensor) -> torch.Tensor:
            found = honest(self, parameter)
            return found + 0.1 if self.name == "model.layers.2.temporal_block.o_proj.bias" else found

        monkeypatch.setattr(Stored, "cut", wrong)
    elif fault == "order of ids":
        honest_call = PreTrainedTokenizerFast.__call__

        def reordered(self: PreTrainedTokenizerFast, text: str, **options: Any) -> Any:
            found = honest_call(self, text, **options)
            found["input_ids"] = found["input_ids"][::-1]
            return found

        monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", reordered)
        monkeypatch.setattr(models.hf.verify, "PROBES", ("a level a",))
        monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda self, ids, **options: "a level a")
    else:
        other = tmp_path / "other.model"
        train_tokenizer([text.upper() for text in TEXTS], 500, other)
        honest_conversion = models.hf.export.convert_tokenizer
        monkeypatch.setattr(models.hf.export, "convert_tokenizer", lambda path: honest_conversion(other))
    target = tmp_path / "out" / "model"
    with pytest.raises(ValueError, match="logits differ" if fault == "weights" else "tokenizer: "):
        export(run, target)
    assert list(target.parent.iterdir()) == []


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    assert "example: python -m models.hf export" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        main(["export"])
    assert exit_info.value.code == 2
