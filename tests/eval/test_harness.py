"""lm-evaluation-harness over our models against lm-eval's own model class on what was exported."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.tokenizer import Tokenizer
from eval.__main__ import main
from eval.harness import lm_eval_model, read_settings, rolling_windows
from eval.harness_tasks import find_tasks, run_tasks
from eval.model import LocalModel, continuation
from eval.open_model import open_model
from models.lm import LM
from tests.eval.lm_eval_tasks import NAMES, write_tasks
from tests.models.griffin import griffin, griffin_config, write_run

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "tokenizer.model"
LICENSE = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8")
PAIRS = [
    ("The license is ", "perpetual"),
    ("The license is ", "worldwide and free of charge"),
    ("", "Apache"),
    (LICENSE[:700], " and distribute"),
    (LICENSE[:700], " or not"),
    ("a", "b"),
    ("naïve ", "😀"),
]


@pytest.fixture(scope="module")
def speaker() -> LM:
    """As many tokens as the tokenizer has. Single bytes it does not say: where they make no character, transformers
    and SentencePiece put other texts in their place."""
    model = griffin(griffin_config(vocab_size=Tokenizer(TOKENIZER).vocab_size)).eval()
    with torch.no_grad():
        model.embed.weight[:261] = 0.0
    return model


@pytest.fixture(scope="module")
def run(speaker: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", speaker, TOKENIZER)


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    from models.hf.export import export

    export(run, run.parent / "exported")
    return run.parent / "exported"


@pytest.fixture(scope="module")
def theirs(exported: Path) -> Any:
    """lm-eval's own class. Batches of one: RecurrentGemma's convolution sees padding on the left."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(exported), dtype="float32", device="cpu", batch_size=1, add_bos_token=True, max_length=8192
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("lm_eval") / "tasks")


def ours(speaker: LM, batch_size: int = 3) -> Any:
    return lm_eval_model(LocalModel(speaker, Tokenizer(TOKENIZER), batch_size=batch_size))


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=args, task_name="tiny") for args in arguments]


def test_log_likelihoods_are_theirs(speaker: LM, theirs: Any) -> None:
    expected = theirs.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    found = ours(speaker).loglikelihood(requests(*PAIRS), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        torch.tensor([x for x, _ in found]), torch.tensor([x for x, _ in expected]), rtol=1e-5, atol=1e-4
    )


def test_greedy_continuations_are_known_as_such(speaker: LM, theirs: Any) -> None:
    """Most tokens of a random model are not greedy: here are some that are."""
    tokenizer = Tokenizer(TOKENIZER)
    contexts = [LICENSE[:n].rstrip() for n in range(3, 120, 3)]
    added = ours(speaker).generate_until(requests(*((context, {"max_gen_toks": 1}) for context in contexts)))
    kept = [
        (context, text)
        for context, text in zip(contexts, added, strict=True)
        if text.strip() and len(tokenizer.encode(context + text)) == len(tokenizer.encode(context)) + 1
    ][:3]
    assert kept, "continuations that are read as they were said"
    for pairs, greedy in ((kept, True), ([(context, "~" + text) for context, text in kept], False)):
        for model in (ours(speaker), theirs):
            found = [answer for _, answer in model.loglikelihood(requests(*pairs), disable_tqdm=True)]
            assert found == [greedy] * len(kept)


@pytest.fixture
def theirs_rolling(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Their rolling likelihood puts BOS before the document in any case; with `add_bos_token` there are two."""
    monkeypatch.setattr(theirs, "add_bos_token", False)
    return theirs


def test_rolling_likelihoods_are_theirs(speaker: LM, theirs_rolling: Any) -> None:
    texts = requests((LICENSE[:2500],), ("é",), (LICENSE[:100],))
    expected = theirs_rolling.loglikelihood_rolling(texts, disable_tqdm=True)
    found = ours(speaker).loglikelihood_rolling(texts, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert ours(speaker).loglikelihood_rolling(requests(("",))) == [0.0]


def test_generation_is_theirs(speaker: LM, theirs: Any) -> None:
    settings = {"until": ["e", "\n\n"], "max_gen_toks": 16, "do_sample": False}
    asked = requests(*((LICENSE[:n], settings) for n in (5, 60, 333)), ("x", {"until": "zzz", "max_new_tokens": 5}))
    assert ours(speaker).generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


@pytest.mark.parametrize(
    ("name", "metrics"),
    [("tiny_choice", ("acc", "acc_norm")), ("tiny_generation", ("exact_match",))],
)
def test_whole_tasks_give_the_same_numbers(
    speaker: LM, theirs: Any, tasks: Path, name: str, metrics: tuple[str, ...]
) -> None:
    expected, found = (run_tasks(model, find_tasks([name], tasks), [name]) for model in (theirs, ours(speaker)))
    assert set(metrics) <= found[name].keys()
    assert found == expected


def test_a_rolling_task_gives_the_same_numbers(speaker: LM, theirs_rolling: Any, tasks: Path) -> None:
    name = "tiny_rolling"
    expected, found = (
        run_tasks(model, find_tasks([name], tasks), [name])[name] for model in (theirs_rolling, ours(speaker))
    )
    for metric in ("bits_per_byte", "word_perplexity"):
        assert found[metric] == pytest.approx(expected[metric], rel=1e-5)


def test_the_exported_directory_scores_alike(exported: Path, speaker: LM, theirs: Any) -> None:
    """Through transformers' class: what `python -m eval HF_DIR` does with models that Rondo does not import."""
    from eval.foreign import ForeignModel

    foreign = lm_eval_model(ForeignModel(exported, batch_size=4))
    expected = ours(speaker).loglikelihood(requests(*PAIRS), disable_tqdm=True)
    found = foreign.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=1e-5, abs=1e-4)
    settings = {"until": ["e"], "max_gen_toks": 8}
    asked = requests(*((LICENSE[:n], settings) for n in (5, 60, 60, 90)))
    assert foreign.generate_until(asked) == ours(speaker).generate_until(asked)


def test_a_directory_that_rondo_imports_becomes_its_own_model(exported: Path, speaker: LM) -> None:
    opened = open_model(exported, batch_size=2)
    assert "as Rondo's own" in opened.description
    assert opened.model.longest is None, "read in one pass, whatever its length"
    texts = requests((LICENSE[:2500],), ("é",))
    found = lm_eval_model(opened.model).loglikelihood_rolling(texts, disable_tqdm=True)
    assert found == pytest.approx(ours(speaker).loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-6)


def test_windows_ask_for_every_token_once_with_all_the_context_there_is() -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for length in (1, 6, 7, 8, 13, 14, 15):
        tokens = list(range(10, 10 + length))
        rows = rolling_windows(continuation([1], tokens), 7) if length > 7 else [continuation([1], tokens)]
        pairs = map(
            make_disjoint_window, get_rolling_token_windows(tokens, prefix_token=1, max_seq_len=7, context_len=1)
        )
        expected = [((before + asked)[:-1], asked) for before, asked in pairs]
        assert [(row.input_ids.tolist(), row.labels[row.labels >= 0].tolist()) for row in rows] == expected


def test_settings_of_a_task() -> None:
    sampling, stops = read_settings({"until": "x", "do_sample": True, "top_k": 5, "max_new_tokens": 3})
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, stops) == (3, 1.0, 5, ["x"])
    assert read_settings({"do_sample": False, "temperature": 0.7})[0].temperature == 0
    with pytest.raises(ValueError, match=r"^generation_kwargs: num_beams; known are "):
        read_settings({"num_beams": 4})


def test_command_takes_both_kinds_of_tasks_and_keeps_answers(
    run: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(LICENSE[:500])
    names = f"bits_per_byte,{','.join(NAMES)}"
    cache = ["--cache", str(tmp_path / "answers")]
    arguments = [str(run), "--tasks", names, "--include", str(tasks), "--set", f"bits_per_byte.path={text}", *cache]
    assert main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    record = json.loads((run / "results.json").read_text())
    assert record["results"].keys() == {"bits_per_byte", *NAMES}
    assert [line.split()[0] for line in table][1:6].count("bits_per_byte") == 5
    assert any(line.split()[:2] == ["tiny_choice", "acc"] and len(line.split()) == 4 for line in table)
    assert record["digest"]

    def answered(*_: Any) -> Any:
        raise AssertionError("the answers are kept")

    monkeypatch.setattr(LocalModel, "generate_texts", answered)
    monkeypatch.setattr(LocalModel, "score", answered)
    again = [str(run / "checkpoints" / "step_00000020"), "--tasks", ",".join(NAMES), "--include", str(tasks), *cache]
    assert main([*again, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert found == {name: record["results"][name] for name in NAMES}
    assert (run / "evaluations" / "step_00000020.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "tiny_choise"], r"tasks: 'tiny_choise'; there is no such task; did you mean tiny_choice"),
        (["--tasks", "bits_per_byte"], r"bits_per_byte\.path: missing"),
        (["--tasks", "bits_per_byte", "--set", "bits_per_byte.paht=x"], r"bits_per_byte\.paht: .*did you mean path"),
        (["--tasks", "tiny_choice", "--set", "bits_per_byte.path=x"], r"--set: .*must be TASK\.KEY=VALUE"),
        (["--tasks", "tiny_choice", "--output", "/nowhere/at/all.json"], r"--output: .*directory must exist"),
        (["--tasks", "tiny_choice"], r"neither a run directory nor a checkpoint"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    arguments: list[str],
    message: str,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    from lm_eval.tasks import TaskManager

    def local(**settings: Any) -> Any:  # indexing all tasks takes half a minute
        return TaskManager(include_path=str(tasks), include_defaults=False)

    monkeypatch.setattr("eval.harness_tasks._task_manager_class", lambda: local)
    assert main([str(tmp_path), "--include", str(tasks), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_the_list_shows_both_kinds_of_tasks(
    tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    def local(**settings: Any) -> Any:
        return TaskManager(include_path=str(tasks), include_defaults=False)

    monkeypatch.setattr("eval.harness_tasks._task_manager_class", lambda: local)
    assert main(["--list", "--include", str(tasks)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"bits_per_byte", *NAMES} <= {line.split()[0] for line in lines}
    assert any(re.match(r"multiple_choice +\w+ .*", line) for line in lines), "ours with what they are"
    assert main(["--list", "tiny_c", "--include", str(tasks)]) == 0
    assert capsys.readouterr().out == "tiny_choice\n"


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("words")
    settings = ["--tasks", "bits_per_byte", "--set", f"bits_per_byte.path={tmp_path / 'text.txt'}"]
    assert main([str(tmp_path / "nothing"), *settings]) == 1
    assert re.fullmatch(r"eval: .*nothing: no such directory; name a run, .*\n", capsys.readouterr().err)
