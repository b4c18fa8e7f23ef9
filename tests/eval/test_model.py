"""Scores against the full forward: in chunks, batches, behind shared beginnings; and what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import eval.generate
import eval.model
from data.synthetic import NO_TARGET
from data.tokenizer import Tokenizer
from eval.foreign import ForeignModel, until
from eval.load import load
from eval.model import LocalModel, Row, Scores, continuation, encode_pair, windows
from eval.open_model import open_model
from eval.sampling import Sampling
from models.lm import LM
from tests.eval.test_generation_state import stack
from tests.models.griffin import griffin, write_run

TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "tokenizer.model"
KINDS = ("rglru", "hgrn2", "gated_deltanet", "paralstm", "local_attention", "attention")


@pytest.fixture(scope="module")
def model() -> LM:
    return stack(*KINDS, dtype=torch.float32)


def some_rows() -> list[Row]:
    """Of unequal length; five that share a beginning, two a shorter one, one that asks for everything, one nothing."""
    generator = np.random.default_rng(0)
    shared, other = (generator.integers(43, size=n).tolist() for n in (40, 23))
    rows = [continuation(shared, generator.integers(43, size=n).tolist()) for n in (1, 2, 9, 3, 30)]
    rows += [continuation(other, [1, 2]), continuation(other, [3])]
    rows += [continuation([2], generator.integers(43, size=n).tolist()) for n in (77, 1, 5)]
    sparse = continuation([2], generator.integers(43, size=50).tolist())
    sparse.labels[generator.random(50) < 0.7] = NO_TARGET
    nothing = Row(np.arange(4), np.full(4, NO_TARGET))
    return [*rows, sparse, nothing]


@torch.no_grad()
def by_full_forward(model: LM, row: Row) -> Scores:
    input_ids = torch.from_numpy(row.input_ids)[None]
    logits, _ = model(input_ids, torch.arange(input_ids.shape[1])[None])
    asked, labels = row.labels != NO_TARGET, torch.from_numpy(row.labels)
    nll, hit = np.zeros(len(labels)), np.zeros(len(labels), dtype=bool)
    nll[asked] = -logits[0].log_softmax(-1)[torch.arange(len(labels)), labels.clamp(min=0)].numpy()[asked]
    hit[asked] = (logits[0].argmax(-1) == labels).numpy()[asked]
    return Scores(nll, hit)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("chunk", [16, 1024])
def test_scores_are_those_of_the_full_forward(
    model: LM, batch_size: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the batch and however the rows are read."""
    monkeypatch.setattr(eval.model, "SCORE_CHUNK", chunk)
    monkeypatch.setattr(eval.generate, "PREFILL_CHUNK", chunk)
    rows = some_rows()
    found = LocalModel(model, None, batch_size=batch_size).score(rows)
    for row, scores in zip(rows, found, strict=True):
        expected = by_full_forward(model, row)
        np.testing.assert_allclose(scores.nll, expected.nll, rtol=1e-5, atol=2e-5)
        assert (scores.hit == expected.hit).all()
    assert sum(scores.hit.sum() for scores in found) > 0


def test_a_beginning_that_rows_share_is_read_once(model: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, read = some_rows()[:5], []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: read.append(ids.numel()) or hidden(ids, *rest))
    LocalModel(model, None, batch_size=1).score(rows)
    lengths = [len(row.input_ids) for row in rows]
    assert sum(read) == sum(lengths) - 4 * 39


def test_a_document_of_any_length_is_read_in_pieces(model: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval.model, "SCORE_CHUNK", 32)
    row = continuation([2], np.random.default_rng(1).integers(43, size=200).tolist())
    longest = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: longest.append(ids.shape[1]) or hidden(ids, *rest))
    (scores,) = LocalModel(model, None).score([row])
    assert max(longest) == 32
    assert len(longest) == 7
    np.testing.assert_allclose(scores.nll, by_full_forward(model, row).nll, rtol=1e-5, atol=2e-5)


def test_generation_does_not_depend_on_the_batch(model: LM) -> None:
    prompts = [[2, 3, 4], [2], [5, 6, 7, 8, 9], [2, 9]]
    sampling = Sampling(max_tokens=6, seed=3)
    expected = LocalModel(model, None, batch_size=4).generate(prompts, sampling)
    assert len(set(map(tuple, expected))) > 1
    for batch_size in (1, 3):
        assert LocalModel(model, None, batch_size=batch_size).generate(prompts, sampling) == expected


def test_a_row_is_cut_into_windows_that_ask_for_every_token_once() -> None:
    row = continuation([2], list(range(10, 30)))
    parts = list(windows(row, 8))
    assert [len(part.labels) for part in parts] == [8, 8, 4]
    assert np.concatenate([part.labels for part in parts]).tolist() == list(range(10, 30))


def test_pairs_are_cut_as_lm_eval_cuts_them() -> None:
    tokenizer = Tokenizer(TOKENIZER)
    for context, ending in (("The license is ", "free"), ("a", "b"), ("", "x"), ("é", "\n"), ("x  ", "  y")):
        before, after = encode_pair(tokenizer, context, ending)
        assert before[0] == tokenizer.bos_id
        assert after
        assert tokenizer.decode([*before, *after]) == context + ending


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Row(np.array([], dtype=np.int64), np.array([], dtype=np.int64))], r"^rows\[0\]: empty"),
        ([continuation([1], [2]), continuation([1], [43])], r"^rows\[1\]: token 43; the model has tokens 0 to 42"),
    ],
)
def test_rows_that_cannot_be_scored(model: LM, rows: list[Row], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalModel(model, None).score(rows)


def test_a_continuation_needs_a_context() -> None:
    with pytest.raises(ValueError, match=r"^context: empty"):
        continuation([], [1])


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """61 rows cannot be a tokenizer's of hundreds of tokens."""
    with pytest.raises(ValueError, match=r"tokenizer\.model: \d+ tokens, but the model's vocab_size is 61; "):
        load(write_run(tmp_path / "run", griffin(), TOKENIZER))
    with pytest.raises(ValueError, match="vocab_size is 61"):
        open_model(tmp_path / "run")


def test_a_model_of_tokens_that_are_no_text_is_opened(tmp_path: Path) -> None:
    opened = open_model(write_run(tmp_path / "run", griffin(), None))
    assert opened.model.tokenizer is None
    assert opened.model.vocab_size == 61
    assert "step_00000020" in opened.description


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 24 positions with our tokenizer's pieces, as anybody might have one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from models.hf.tokenizer import convert_tokenizer

    directory = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    tokenizer = convert_tokenizer(TOKENIZER)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_foreign_model_is_scored_and_continued(transformer: Path) -> None:
    """Batches of ragged rows against rows alone."""
    rows = [continuation([2, 5, 9][:n], [7, 8, 9, 10][: 5 - n]) for n in (1, 2, 3)]
    together, alone = (ForeignModel(transformer, batch_size=n).score(rows) for n in (8, 1))
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.nll, b.nll, rtol=1e-5, atol=1e-5)
    opened = open_model(transformer)
    assert "gpt2, by transformers" in opened.description
    prompts, sampling = [[2, 5, 9], [2], [2, 5, 8], [2, 5, 9]], Sampling(max_tokens=5, temperature=0)
    found = opened.model.generate(prompts, sampling)
    assert found[0] == found[3]
    assert found == [opened.model.generate([prompt], sampling)[0] for prompt in prompts]
    texts = opened.model.generate_texts(prompts, sampling)
    assert (
        opened.model.generate_texts(prompts, sampling, ["zzz", texts[1][1:2]])[1] == texts[1].partition(texts[1][1])[0]
    )


def test_what_a_foreign_model_samples_does_not_depend_on_the_batch(transformer: Path) -> None:
    prompts, sampling = [[2, 5, 9], [2], [2, 5, 8], [2, 5, 9]], Sampling(max_tokens=5, seed=1)
    together, alone = (ForeignModel(transformer, batch_size=n).generate(prompts, sampling) for n in (8, 1))
    assert together == alone
    assert together[0] != together[3], "equal prompts draw numbers of their own"
    other = Sampling(max_tokens=5, seed=2)
    assert ForeignModel(transformer).generate(prompts, other) != together


def test_the_digest_is_of_the_model_alone(transformer: Path, tmp_path: Path) -> None:
    """Answers are kept by it: results written beside the model must not make it another one."""
    shutil.copytree(transformer, tmp_path / "gpt2")
    digest = open_model(tmp_path / "gpt2").digest
    (tmp_path / "gpt2" / "results.json").write_text("{}")
    assert open_model(tmp_path / "gpt2").digest == digest
    settings = tmp_path / "gpt2" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"layer_norm_epsilon": 1e-3}))
    assert open_model(tmp_path / "gpt2").digest != digest


PARROT = """
from transformers import GPT2Config, GPT2LMHeadModel

print("the directory's code runs")


class ParrotConfig(GPT2Config):
    model_type = "parrot"


class ParrotForCausalLM(GPT2LMHeadModel):
    config_class = ParrotConfig
"""


def test_code_of_a_directory_runs_only_when_asked(
    transformer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from eval.__main__ import main

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tmp_path / "parrot"
    shutil.copytree(transformer, directory)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"model_type": "parrot"}))
    text = tmp_path / "text.txt"
    text.write_text("words")
    arguments = [str(directory), "--tasks", "bits_per_byte", "--set", f"bits_per_byte.path={text}"]
    assert main(arguments) == 1
    assert re.search(r"config.json: model_type: 'parrot'; transformers .* has no such class", capsys.readouterr().err)
    classes = {"AutoConfig": "parrot.ParrotConfig", "AutoModelForCausalLM": "parrot.ParrotForCausalLM"}
    (directory / "config.json").write_text(json.dumps(settings | {"model_type": "parrot", "auto_map": classes}))
    (directory / "parrot.py").write_text(PARROT)
    assert main(arguments) == 1
    out, error = capsys.readouterr()
    assert error.count("\n") == 1
    assert "auto_map: 'parrot' is a class of parrot.py, which do not run unasked; read them, then give --trust" in error
    assert "code runs" not in out
    assert not (directory / "results.json").exists()
    assert main([*arguments, "--trust-remote-code"]) == 0
    assert "the directory's code runs" in capsys.readouterr().out
    found = json.loads((directory / "results.json").read_text())["results"]["bits_per_byte"]["loss"]
    assert main([str(transformer), *arguments[1:], "--output", str(tmp_path / "plain.json")]) == 0
    plain = json.loads((tmp_path / "plain.json").read_text())["results"]["bits_per_byte"]["loss"]
    assert found == pytest.approx(plain, rel=1e-6)


def test_a_positional_limit_is_kept(transformer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from eval.__main__ import main

    model = ForeignModel(transformer)
    assert model.longest == 24
    with pytest.raises(ValueError, match=r"^rows\[0\]: 25 tokens; at most 24 have a position; shorten the context"):
        model.score([continuation([2] * 25, [3])])
    with pytest.raises(ValueError, match=r"^prompts\[1\]: 20 tokens and 5 to add; at most 24 have a position"):
        model.generate([[2], [2] * 20], Sampling(max_tokens=5))
    with pytest.raises(ValueError, match=r"^prompts\[0\]: empty"):
        model.generate([[]], Sampling(max_tokens=5))
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text(json.dumps({"question": "why " * 40, "choices": ["a", "b"], "answer": 0}))
    arguments = ["--tasks", "multiple_choice", "--set", f"multiple_choice.path={quiz}", "--output", str(tmp_path / "r")]
    assert main([str(transformer), *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("eval: rows[0]: ")
    assert "at most 24 have a position" in error
    assert not (tmp_path / "r").exists()


def test_a_foreign_tokenizer_of_another_model_is_refused(transformer: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((transformer / name).read_bytes())
    with pytest.raises(ValueError, match=r"its tokenizer: \d+ tokens, but the model's vocab_size is 50"):
        ForeignModel(tmp_path)


def test_text_before_the_first_stop() -> None:
    assert until("a b c", ["c", "b"]) == "a "
    assert until("a b c", ["", "x"]) == "a b c"
