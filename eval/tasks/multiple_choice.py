"""Multiple choice from a JSONL file: which ending does the model find most likely?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from eval.model import EvalModel, Row, continuation, encode_pair


class Question(NamedTuple):
    """A row for each choice, the choices' lengths in characters, and which of them is right."""

    rows: tuple[Row, ...]
    lengths: tuple[int, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class MultipleChoice:
    """The share of questions whose right choice is the likeliest, and, normalised, the likeliest a character.

    A line of the file is an object with `question`, `choices` (a list of texts) and `answer` (the index of the right
    one, from 0).

    Attributes:
        path: the file.
        separator: stands between question and choice.
        limit: questions taken, from the first on; None takes all.
    """

    generates: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True

    path: str
    separator: str = " "
    limit: int | None = None

    def check(self, vocab_size: int, longest: int | None) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: {self.limit}; must be at least 1; leave it out to take all questions")
        if not Path(self.path).is_file():
            raise ValueError(f"path: {self.path!r}; must be a JSONL file of question, choices and answer")
        self.questions()

    def questions(self) -> list[dict[str, Any]]:
        """The lines of the file, checked."""
        found = []
        for number, line in enumerate(Path(self.path).read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                found.append(_question(f"path: {self.path}, line {number}", line))
        if not found:
            raise ValueError(
                f"path: {self.path!r}; holds no question; a line is an object with question, choices, answer"
            )
        return found[: self.limit]

    def examples(self, model: EvalModel) -> Sequence[Question]:
        tokenizer = model.tokenizer
        questions = []
        for asked in self.questions():
            endings = [f"{self.separator}{choice}" for choice in asked["choices"]]
            rows = tuple(continuation(*encode_pair(tokenizer, asked["question"], ending)) for ending in endings)
            questions.append(Question(rows, tuple(map(len, asked["choices"])), asked["answer"]))
        return questions

    def evaluate(self, model: EvalModel) -> dict[str, float]:
        questions = self.examples(model)
        scores = iter(model.score([row for question in questions for row in question.rows]))
        right, right_normalised = [], []
        for question in questions:
            likelihoods = np.array([next(scores).log_likelihood for _ in question.rows])
            right.append(likelihoods.argmax() == question.answer)
            right_normalised.append((likelihoods / np.array(question.lengths)).argmax() == question.answer)
        count = len(questions)
        accuracy = float(np.mean(right))
        return {
            "accuracy": accuracy,
            "accuracy_stderr": (accuracy * (1 - accuracy) / max(count - 1, 1)) ** 0.5,
            "accuracy_normalised": float(np.mean(right_normalised)),
            "questions": count,
        }


def _question(where: str, line: str) -> dict[str, Any]:
    """A line of the file. Raises ValueError."""
    try:
        asked = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON ({error.msg}); write one object a line") from None
    shape = "an object with a text `question`, a list `choices` of at least two texts, and an index `answer` into it"
    if not isinstance(asked, dict) or not isinstance(asked.get("question"), str):
        raise ValueError(f"{where}: must be {shape}")
    choices, answer = asked.get("choices"), asked.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
        or not isinstance(answer, int)
        or isinstance(answer, bool)
        or not 0 <= answer < len(choices)
    ):
        raise ValueError(f"{where}: choices {choices!r:.60}, answer {answer!r}; must be {shape}")
    return asked
