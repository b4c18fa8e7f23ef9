"""Bits per byte and multiple choice against sums written out, by state and by windows."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.tokenizer import Tokenizer
from eval.model import LocalModel, Row, Scores
from eval.tasks.bits_per_byte import BitsPerByte
from eval.tasks.multiple_choice import MultipleChoice
from models.lm import LM
from tests.models.griffin import griffin, griffin_config

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = ROOT / "tests" / "assets" / "tokenizer.model"
LICENSE = (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> LM:
    return griffin(griffin_config(vocab_size=tokenizer.vocab_size)).eval()


def counting(tokenizer: Any, longest: int | None = None, cost: float = 2.0) -> Any:
    """A model to which every token costs the same, and which remembers what it was asked."""
    asked: list[Row] = []

    def score(rows: list[Row]) -> list[Scores]:
        asked.extend(rows)
        return [Scores(np.where(row.labels >= 0, cost, 0.0), row.labels >= 0) for row in rows]

    return SimpleNamespace(tokenizer=tokenizer, longest=longest, score=score, asked=asked)


def test_bits_are_those_of_the_tokens_over_the_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = {"b.txt": "naïve\n", "a.txt": "The Work", "empty.txt": "", "c.md": "not asked"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    task = BitsPerByte(path=str(tmp_path))
    task.check(tokenizer.vocab_size, None)
    asked = counting(tokenizer)
    found = task.evaluate(asked)
    tokens = [tokenizer.encode(texts[name]) for name in ("a.txt", "b.txt")]
    count = sum(map(len, tokens))
    num_bytes = sum(len(texts[name].encode()) for name in ("a.txt", "b.txt"))
    assert [row.labels.tolist() for row in asked.asked] == tokens
    assert all(row.input_ids[0] == tokenizer.bos_id for row in asked.asked)
    assert found == {
        "bits_per_byte": pytest.approx(2.0 * count / math.log(2) / num_bytes),
        "loss": pytest.approx(2.0),
        "documents": 2,
        "bytes": num_bytes,
        "tokens": count,
    }


def test_a_file_may_hold_several_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("one\n\ntwo\n\n")
    assert BitsPerByte(path=str(tmp_path / "text"), separator="\n\n").texts() == ["one", "two"]
    assert BitsPerByte(path=str(tmp_path / "text")).texts() == ["one\n\ntwo\n\n"]


def test_windows_ask_for_the_tokens_of_the_whole(tokenizer: Tokenizer, model: LM, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(LICENSE[:600])
    task = BitsPerByte(path=str(tmp_path / "text"))
    windowed = counting(tokenizer, longest=16)
    cut, whole = task.evaluate(windowed), task.evaluate(LocalModel(model, tokenizer))
    assert max(len(row.labels) for row in windowed.asked) == 16
    assert np.concatenate([row.labels for row in windowed.asked]).tolist() == tokenizer.encode(LICENSE[:600])
    assert cut["tokens"] == whole["tokens"]
    assert whole == pytest.approx(task.evaluate(LocalModel(model, tokenizer, batch_size=1)))


def write_quiz(path: Path, *questions: Any) -> Path:
    path.write_text("\n".join(json.dumps(question) for question in questions) + "\n\n", encoding="utf-8")
    return path


def test_the_likeliest_choice_counts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Where tokens cost the same it is the one of the fewest; the likeliest a character is another."""
    short, long = "x", "License License License"
    assert len(tokenizer.encode(" " + short)) < len(tokenizer.encode(" " + long))
    quiz = write_quiz(
        tmp_path / "quiz.jsonl",
        {"question": "Which?", "choices": [long, short], "answer": 1},
        {"question": "Which?", "choices": [short, long], "answer": 1},
        {"question": "", "choices": [short, long], "answer": 0},
    )
    task = MultipleChoice(path=str(quiz))
    task.check(tokenizer.vocab_size, None)
    asked = counting(tokenizer)
    found = task.evaluate(asked)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_normalised"] == pytest.approx(1 / 3)
    assert found["questions"] == 3
    assert found["accuracy_stderr"] == pytest.approx((2 / 3 * 1 / 3 / 2) ** 0.5)
    assert [tokenizer.decode([*row.input_ids.tolist(), row.labels[-1]]) for row in asked.asked[:2]] == [
        f"Which? {long}",
        f"Which? {short}",
    ]
    assert MultipleChoice(path=str(quiz), limit=1).evaluate(counting(tokenizer))["questions"] == 1


def test_answers_do_not_depend_on_the_batch(tokenizer: Tokenizer, model: LM, tmp_path: Path) -> None:
    questions = [
        {"question": LICENSE[n : n + 90], "choices": [LICENSE[n + 90 : n + 99], "x", "the"], "answer": n % 3}
        for n in range(0, 900, 150)
    ]
    task = MultipleChoice(path=str(write_quiz(tmp_path / "quiz.jsonl", *questions)))
    found = [task.evaluate(LocalModel(model, tokenizer, batch_size=n)) for n in (1, 4)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: no JSON"),
        ("[]", r"line 2: must be an object with a text `question`"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', r"line 2: choices \['b'\], answer 0; must be an object"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', r"line 2: .*answer 2; must be"),
        ('{"question": "a", "choices": ["b", ""], "answer": 0}', r"line 2: "),
        ('{"question": "a", "choices": ["b", "c"], "answer": true}', r"line 2: .*answer True"),
    ],
)
def test_a_damaged_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    quiz = write_quiz(tmp_path / "quiz.jsonl", {"question": "a", "choices": ["b", "c"], "answer": 0})
    quiz.write_text(quiz.read_text().rstrip() + "\n" + line)
    with pytest.raises(ValueError, match=f"^path: .*quiz\\.jsonl, {message}"):
        MultipleChoice(path=str(quiz)).check(400, None)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (BitsPerByte(path="no/such"), r"path: 'no/such'; must be a file, or a directory of files \*\.txt"),
        (BitsPerByte(path=str(TOKENIZER.parent)), r"path: .*; must be a file, or a directory"),
        (BitsPerByte(path=str(TOKENIZER), separator=""), r"separator: ''; must hold a character"),
        (MultipleChoice(path="no/such"), r"path: 'no/such'; must be a JSONL file"),
        (MultipleChoice(path=str(TOKENIZER), limit=0), r"limit: 0; must be at least 1"),
    ],
)
def test_what_cannot_be_read(task: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        task.check(400, None)


def test_what_is_no_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"^path: .*a\.txt; must be UTF-8 \(invalid start byte at byte 1\)"):
        BitsPerByte(path=str(tmp_path)).evaluate(counting(tokenizer))
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^path: .*; holds no text"):
        BitsPerByte(path=str(tmp_path)).evaluate(counting(tokenizer))
    write_quiz(tmp_path / "quiz.jsonl")
    with pytest.raises(ValueError, match=r"^path: .*; holds no question"):
        MultipleChoice(path=str(tmp_path / "quiz.jsonl")).check(400, None)
