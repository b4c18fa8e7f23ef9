"""One thing to be remembered over a long row of others, at a depth that can be chosen.

Passkey: Mohtashami and Jaggi, 2023, "Landmark Attention" (arXiv 2305.16300); needles among others of their kind: Hsieh
et al., 2024, "RULER" (arXiv 2404.06654). `eval/tasks` asks text models the same in words.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data.synthetic.task import NO_TARGET, refuse_below, refuse_length, refuse_vocabulary

DIGITS = 10
MAX_CYCLE = 8


@dataclass(frozen=True, kw_only=True)
class Passkey:
    """A number in a filler that repeats itself, and at the end the question for it; its digits are the targets.

    Tokens 0 to 9 are digits, 10 announces the number, 11 asks for it, up to 8 further ones are the filler.

    Attributes:
        digits: of the number.
    """

    prefix_closed: ClassVar[bool] = False

    digits: int = 5

    def check(self, sequence_length: int, vocab_size: int) -> None:
        refuse_below(1, digits=self.digits)
        refuse_vocabulary(vocab_size, DIGITS + 3, "digits, two markers and a filler")
        refuse_length(sequence_length, 2 * self.digits + 1, "the number, the question and the answer")

    def row(self, generator: np.random.Generator, sequence_length: int, vocab_size: int) -> np.ndarray:
        """Input ids and labels, int64 [2, T], the number at any depth with equal chances."""
        return self.row_at(generator, sequence_length, vocab_size, generator.random())

    def row_at(self, generator: np.random.Generator, sequence_length: int, vocab_size: int, depth: float) -> np.ndarray:
        """The same with the number at `depth`: 0 before all filler, 1 after it."""
        number = generator.integers(DIGITS, size=self.digits)
        filler = sequence_length - 2 * self.digits - 1
        before = round(depth * filler)
        cycle = np.arange(DIGITS + 2, min(vocab_size, DIGITS + 2 + MAX_CYCLE))
        noise = np.resize(np.roll(cycle, int(generator.integers(len(cycle)))), filler)
        tokens = np.concatenate([noise[:before], [DIGITS], number, noise[before:], [DIGITS + 1], number])
        labels = tokens[1:].copy()
        labels[: -self.digits] = NO_TARGET
        return np.stack([tokens[:-1], labels])


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Names with their values, scattered in random tokens; at the end one name is asked for, and its value the target.

    Token 0 stands before each name, 1 before the one asked for. Of the others the first quarter are names, the second
    values, and the rest is hay.

    Attributes:
        needles: names in a row, no two alike; all but the one asked for stand anywhere.
    """

    prefix_closed: ClassVar[bool] = False

    needles: int = 4

    def check(self, sequence_length: int, vocab_size: int) -> None:
        refuse_below(1, needles=self.needles)
        refuse_vocabulary(vocab_size, 4 * max(self.needles, 2) + 2, f"two markers and {self.needles} names")
        refuse_length(sequence_length, 3 * self.needles + 2, f"{self.needles} needles and the question")

    def row(self, generator: np.random.Generator, sequence_length: int, vocab_size: int) -> np.ndarray:
        """Input ids and labels, int64 [2, T], the needle asked for at any depth with equal chances."""
        return self.row_at(generator, sequence_length, vocab_size, generator.random())

    def row_at(self, generator: np.random.Generator, sequence_length: int, vocab_size: int, depth: float) -> np.ndarray:
        """The same with the needle asked for at `depth`: 0 before everything else, 1 after it."""
        quarter = (vocab_size - 2) // 4
        names = 2 + generator.permutation(quarter)[: self.needles]
        values = 2 + quarter + generator.integers(quarter, size=self.needles)
        hay = sequence_length - 3 * self.needles - 2
        pieces: list[np.ndarray | list[int]] = [
            [token] for token in generator.integers(2 + 2 * quarter, vocab_size, hay)
        ]
        for name, value in zip(names[1:], values[1:]):
            pieces.insert(int(generator.integers(len(pieces) + 1)), [0, name, value])
        starts = np.cumsum([0, *map(len, pieces)])
        place = int(np.searchsorted(starts, depth * starts[-1]))  # between pieces: no needle is cut in two
        pieces.insert(place, [0, names[0], values[0]])
        tokens = np.concatenate([*pieces, [1, names[0]]]).astype(np.int64)
        labels = np.full(sequence_length, NO_TARGET)
        labels[-1] = values[0]
        return np.stack([tokens, labels])
