"""A passkey, or one needle among several, in a long context: how far back a model remembers, and from which depth.

A model with a tokenizer is asked in words, one without in the tokens of `data.synthetic.retrieval`. What is scored is
the answer's likelihood at every token: an answer counts where each of its tokens is the most likely one, which is where
greedy decoding would write it. A row of 64k tokens is read through the state like any other.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from data.synthetic import row_generator, stream_key
from data.synthetic.retrieval import Needle as NeedleTokens
from data.synthetic.retrieval import Passkey as PasskeyTokens
from eval.model import EvalModel, Row, continuation, encode_pair
from eval.tasks.generated import check_counts, check_generated, of_same_settings

FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
NAMES = (
    *("Amsterdam", "Bergen", "Cordoba", "Dresden", "Edinburgh", "Florence", "Geneva", "Hamburg", "Istanbul", "Jaipur"),
    *("Kyoto", "Lisbon", "Marseille", "Naples", "Oslo", "Porto", "Quito", "Rotterdam", "Salzburg", "Toledo", "Utrecht"),
    *("Valencia", "Warsaw", "Zurich"),
)
WORDS = (
    ("old", "quiet", "young", "careful", "tired", "clever", "proud", "gentle", "hungry", "lonely", "patient", "brave"),
    ("farmer", "teacher", "sailor", "baker", "painter", "doctor", "miller", "singer", "tailor", "gardener", "clerk"),
    ("carried", "found", "repaired", "sold", "painted", "hid", "borrowed", "admired", "forgot", "measured", "washed"),
    ("broken", "wooden", "golden", "heavy", "empty", "narrow", "painted", "forgotten", "tiny", "strange", "silver"),
    ("table", "lamp", "bridge", "letter", "clock", "basket", "window", "ladder", "mirror", "wagon", "bottle", "chair"),
)
"""Adjective, person, verb, adjective, thing: 12 * 11 * 11 * 11 * 12 sentences of hay."""

SAMPLE_SENTENCES = 20
"""Of whose length that of the others is guessed."""

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Cell(NamedTuple):
    """A question of a length and depth."""

    length: int
    depth: float
    row: Row


@dataclass(frozen=True, kw_only=True)
class Retrieval(ABC):
    """What both tasks have in common.

    Metrics: `accuracy`, the share of answers that are right; `accuracy_T` for each length; `heat_map`, a list of
    [length, depth, accuracy].

    Attributes:
        lengths: tokens of a question, its context and answer; in words a few less, as sentences are kept whole.
        depths: so many, evenly from 0, where what is asked for is the first thing said, to 1, where it is the last.
        examples: of each length and depth.
        seed: of all that is drawn.
    """

    generates: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False
    name: ClassVar[str]
    kind: ClassVar[type[Any]]

    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    depths: int = 5
    examples_each: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self.lengths, depths=self.depths, examples_each=self.examples_each)

    def check(self, vocab_size: int, longest: int | None) -> None:
        check_generated(of_same_settings(self.kind, self), self.lengths, vocab_size, longest)

    def _depths(self) -> list[float]:
        return [0.5] if self.depths == 1 else [number / (self.depths - 1) for number in range(self.depths)]

    def examples(self, model: EvalModel) -> list[Cell]:
        return [cell for length in self.lengths for cell in self._of_length(model, length)]

    def _of_length(self, model: EvalModel, length: int) -> Iterator[Cell]:
        key = stream_key(f"eval/{self.name}/{length}/{self.seed}")
        for place, depth in enumerate(self._depths()):
            for number in range(self.examples_each):
                generator = row_generator(key, place * self.examples_each + number)
                if model.tokenizer is None:
                    task = of_same_settings(self.kind, self)
                    yield Cell(length, depth, Row(*task.row_at(generator, length, model.vocab_size, depth)))
                else:
                    yield Cell(length, depth, self._in_words(generator, model.tokenizer, length, depth))

    def evaluate(self, model: EvalModel) -> dict[str, Any]:
        """Length by length, so that no more than the rows of one are held."""
        heat_map: list[list[float]] = []
        by_length: dict[str, float] = {}
        for length in self.lengths:
            cells = list(self._of_length(model, length))
            scores = model.score([cell.row for cell in cells])
            right = np.array([score.hit[cell.row.labels >= 0].all() for cell, score in zip(cells, scores)])
            shares = right.reshape(self.depths, self.examples_each).mean(axis=1).tolist()
            heat_map += [[length, depth, share] for depth, share in zip(self._depths(), shares)]
            by_length[f"accuracy_{length}"] = float(right.mean())
        accuracy = float(np.mean(list(by_length.values())))
        count = len(heat_map) * self.examples_each
        error = (accuracy * (1 - accuracy) / max(count - 1, 1)) ** 0.5
        return {"accuracy": accuracy, "accuracy_stderr": error} | by_length | {"rows": count, "heat_map": heat_map}

    @abstractmethod
    def _in_words(self, generator: np.random.Generator, tokenizer: Any, length: int, depth: float) -> Row:
        """The row of one question, `length` tokens long, its answer `depth` of the way in."""


@dataclass(frozen=True, kw_only=True)
class Passkey(Retrieval):
    """A number said once in a text that repeats itself, and asked for at its end (Mohtashami and Jaggi, 2023).

    Attributes:
        digits: of the number.
    """

    name: ClassVar[str] = "passkey"
    kind: ClassVar[type[Any]] = PasskeyTokens

    digits: int = 5

    def _in_words(self, generator: np.random.Generator, tokenizer: Any, length: int, depth: float) -> Row:
        number = _number(generator, self.digits)
        said = f"The pass key is {number}. Remember it. {number} is the pass key."
        asked = "What is the pass key? The pass key is"

        def context(sentences: int) -> str:
            before = round(depth * sentences)
            filler = [FILLER[i % len(FILLER)] for i in range(sentences)]
            intro = "There is a pass key hidden in the text below. Find it and remember it."
            return " ".join([intro, *filler[:before], said, *filler[before:], asked])

        return fit(context, f" {number}", tokenizer, length)


@dataclass(frozen=True, kw_only=True)
class Needle(Retrieval):
    """One of several cities' numbers, each said once in a text about other things, and asked for at its end.

    Attributes:
        needles: cities whose numbers are said, at most 24; all but the one asked for anywhere.
        path: a text file whose sentences are the hay; sentences drawn from word lists by default.
    """

    name: ClassVar[str] = "needle"
    kind: ClassVar[type[Any]] = NeedleTokens

    needles: int = 4
    path: str | None = None

    def check(self, vocab_size: int, longest: int | None) -> None:
        super().check(vocab_size, longest)
        if self.needles > len(NAMES):
            raise ValueError(f"needles: {self.needles}; there are {len(NAMES)} names; ask for as many at most")
        if self.path is not None and not Path(self.path).is_file():
            raise ValueError(f"path: {self.path!r}; must be a text file, or left out")

    def _in_words(self, generator: np.random.Generator, tokenizer: Any, length: int, depth: float) -> Row:
        names = [NAMES[i] for i in generator.permutation(len(NAMES))[: self.needles]]
        numbers = [_number(generator, 4) for _ in names]
        said = [f"The magic number of {name} is {number}." for name, number in zip(names, numbers)]
        others = generator.random(self.needles - 1)
        sentence = self._hay(generator)
        hay: list[str] = []

        def context(sentences: int) -> str:
            while len(hay) < sentences:
                hay.append(sentence(len(hay)))
            places = [*others, depth]  # the one asked for stands last in the list, so that at 1 it is the last said
            text = [*said[1:], said[0]]
            pieces = list(hay[:sentences])
            for place, needle in sorted(zip(places, text), key=lambda entry: entry[0], reverse=True):
                pieces.insert(round(place * sentences), needle)
            asked = f"What is the magic number of {names[0]}? The magic number of {names[0]} is"
            return " ".join(["Remember the magic numbers in the text below.", *pieces, asked])

        return fit(context, f" {numbers[0]}", tokenizer, length)

    def _hay(self, generator: np.random.Generator) -> Callable[[int], str]:
        """Sentence number i of the hay."""
        if self.path is None:
            return lambda _: "The {} {} {} the {} {}.".format(
                *(words[generator.integers(len(words))] for words in WORDS)
            )
        sentences = SENTENCE_END.split(" ".join(Path(self.path).read_text(encoding="utf-8").split()))
        first = int(generator.integers(len(sentences)))
        return lambda i: sentences[(first + i) % len(sentences)]


def fit(context: Callable[[int], str], answer: str, tokenizer: Any, length: int) -> Row:
    """The question with as many sentences of filler as `length` tokens hold.

    Raises:
        ValueError: it is longer without any.
    """

    def row(sentences: int) -> Row:
        return continuation(*encode_pair(tokenizer, context(sentences), answer))

    shortest, some = row(0), row(SAMPLE_SENTENCES)
    each = (len(some.labels) - len(shortest.labels)) / SAMPLE_SENTENCES
    if len(shortest.labels) > length:
        raise ValueError(f"lengths: {length}; the question alone has {len(shortest.labels)} tokens; name lengths above")
    sentences = int((length - len(shortest.labels)) / each)
    while len((found := row(sentences)).labels) > length:
        sentences -= max(1, int((len(found.labels) - length) / each))
    return found


def _number(generator: np.random.Generator, digits: int) -> str:
    return "".join(map(str, generator.integers(10, size=digits)))
