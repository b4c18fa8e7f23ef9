"""Passkey and needle, in tokens and in words: what is asked, at which depth, and the map that a short memory draws."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.tokenizer import Tokenizer
from eval.tasks import check_task, make_task
from eval.tasks.retrieval import Cell
from tests.eval.tasks.fakes import Fake, at_random, perfect, short_memory

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {"lengths": [300, 600], "depths": 3, "examples_each": 2}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(ROOT / "tests" / "assets" / "tokenizer.model")


def in_words(tokenizer: Tokenizer, cell: Cell) -> tuple[str, str]:
    """The question as a model reads it, and the answer."""
    asked = int((cell.row.labels >= 0).argmax())
    return tokenizer.decode(cell.row.input_ids[: asked + 1].tolist()), tokenizer.decode(
        cell.row.labels[asked:].tolist()
    )


@pytest.mark.parametrize("name", ["passkey", "needle"])
@pytest.mark.parametrize("words", [False, True], ids=["tokens", "words"])
def test_what_models_score(name: str, words: bool, tokenizer: Tokenizer) -> None:
    text = tokenizer if words else None
    task = make_task(name, SETTINGS)
    check_task(name, task, 120, None)
    found = task.evaluate(Fake(perfect, tokenizer=text))
    assert found["accuracy"] == found["accuracy_300"] == found["accuracy_600"] == 1.0
    assert found["rows"] == 12
    expected = [[length, depth, 1.0] for length in (300, 600) for depth in (0.0, 0.5, 1.0)]
    assert found["heat_map"] == expected
    assert task.evaluate(Fake(lambda row, t: 1.0, tokenizer=text))["heat_map"] == [
        [*cell[:2], 0.0] for cell in expected
    ]
    many = make_task(name, SETTINGS | {"lengths": [300], "examples_each": 40})
    digits = np.mean([(cell.row.labels >= 0).sum() for cell in many.examples(Fake(perfect, tokenizer=text))])
    chance = 0.5**digits
    by_chance = many.evaluate(Fake(at_random(0.5), tokenizer=text))["accuracy"]
    assert abs(by_chance - chance) < 0.03 + 4 * (chance * (1 - chance) / 120) ** 0.5, "every token of an answer counts"


def test_the_map_shows_how_far_back_a_model_remembers() -> None:
    """A model that knows the last 200 tokens answers where the number stands among them, and nowhere else."""
    task = make_task("needle", {"lengths": [150, 1000], "depths": 11, "examples_each": 2, "needles": 1})
    found = task.evaluate(Fake(short_memory(200), vocab_size=4000))
    assert [share for length, _, share in found["heat_map"] if length == 150] == [1.0] * 11
    assert [share for length, _, share in found["heat_map"] if length == 1000] == [0.0] * 8 + [share_at(task)] + [
        1.0
    ] * 2
    assert found["accuracy_150"] == 1.0
    assert found["accuracy_1000"] < 0.3


def share_at(task: Any) -> float:
    """At depth 0.8 the needle stands where the memory ends."""
    cells = [cell for cell in task.examples(Fake(perfect, vocab_size=4000)) if (cell.length, cell.depth) == (1000, 0.8)]
    return float(np.mean([cell.row.labels[-1] in cell.row.input_ids[-201:-1] for cell in cells]))


@pytest.mark.parametrize("name", ["passkey", "needle"])
def test_questions_in_words(name: str, tokenizer: Tokenizer) -> None:
    """As long as asked for and no longer; said once, at the depth; asked for last."""
    task = make_task(name, SETTINGS | {"lengths": [600], "depths": 5})
    said = {"passkey": r"The pass key is (\d+)\. Remember", "needle": r"magic number of (\w+) is (\d+)\."}[name]
    for cell in task.examples(Fake(perfect, tokenizer=tokenizer)):
        assert 550 < len(cell.row.labels) <= 600
        assert cell.row.input_ids[0] == tokenizer.bos_id
        question, answer = in_words(tokenizer, cell)
        if name == "passkey":
            (match,) = re.finditer(said, question)
            assert match[1] == answer.strip()
            assert question.endswith("The pass key is")
            assert len(answer.strip()) == 5
        else:
            matches = {m[1]: m for m in re.finditer(said, question)}
            assert len(matches) == 4
            asked = re.search(r"What is the magic number of (\w+)\?", question)[1]  # type: ignore[index]
            match = matches[asked]
            assert match[2] == answer.strip()
            if cell.depth in (0.0, 1.0):
                assert match.start() == [m.start() for m in matches.values()][0 if cell.depth == 0 else -1]
        hay = (match.start() - 70) / (len(question) - 200)
        assert abs(hay - cell.depth) < 0.25, (cell.depth, hay)


def test_hay_of_a_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "hay.txt"
    path.write_text("First of\nall. Second thing! Third one?", encoding="utf-8")
    task = make_task("needle", SETTINGS | {"path": str(path), "lengths": [400], "needles": 2})
    check_task("needle", task, 400, None)
    question, _ = in_words(tokenizer, task.examples(Fake(perfect, tokenizer=tokenizer))[0])
    assert "First of all. Second thing! Third one? First of all." in question


PEAK = """
import resource, sys
import torch
from eval.model import LocalModel
from eval.tasks import make_task
from tests.models.griffin import griffin, griffin_config
torch.set_num_threads(1)
task = make_task("passkey", {"lengths": [int(sys.argv[1])], "depths": 2, "examples_each": 1})
found = task.evaluate(LocalModel(griffin(griffin_config(vocab_size=64)), None))
assert found["rows"] == 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_64k_tokens_take_the_memory_of_4k() -> None:
    """Peak memory of the process, in kB: the row itself and its scores are all that grows."""
    peaks = [
        int(subprocess.run([sys.executable, "-c", PEAK, length], cwd=ROOT, capture_output=True, check=True).stdout)
        for length in ("4096", "65536")
    ]
    assert peaks[1] - peaks[0] < 40_000, peaks


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("passkey", {"lengths": "4096"}, r"passkey\.lengths: \(4096,\); must be at most 2048 here"),
        ("passkey", {"lengths": "8"}, r"passkey\.lengths: 8; .* take 11 tokens"),
        ("needle", {"lengths": "512", "needles": "25"}, r"needle\.needles: 25; there are 24 names"),
        ("needle", {"lengths": "512", "path": "no/such"}, r"needle\.path: 'no/such'; must be a text file"),
    ],
)
def test_what_cannot_be_asked(name: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_task(name, make_task(name, settings), 400, 2048)


def test_a_text_that_is_too_long_for_its_length(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^lengths: 60; the question alone has \d+ tokens; name lengths above"):
        make_task("passkey", {"lengths": [60]}).examples(Fake(perfect, tokenizer=tokenizer))
    with pytest.raises(ValueError, match=r"^passkey\.depths: 0; must be at least 1"):
        make_task("passkey", {"depths": 0})
