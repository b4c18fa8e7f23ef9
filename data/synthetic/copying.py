"""Strings that come twice (Jelassi et al., 2024, "Repeat After Me", arXiv 2402.01032), and the token that followed
another before (Olsson et al., 2022, "In-context Learning and Induction Heads", arXiv 2209.11895)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data.synthetic.task import NO_TARGET, refuse_below, refuse_length, refuse_vocabulary


@dataclass(frozen=True, kw_only=True)
class Copying:
    """A random string, a separator, and the string again: every token of the copy is a target.

    The separator is token 0, strings are made of the others.

    Attributes:
        length: tokens of a string; a row has as many strings, each with its copy, as it has room for, and the last may
            be cut off. 0: one string, half of the row.
    """

    prefix_closed: ClassVar[bool] = False

    length: int = 0

    def check(self, sequence_length: int, vocab_size: int) -> None:
        refuse_below(0, length=self.length)
        refuse_vocabulary(vocab_size, 3, "a separator and two symbols to copy")
        refuse_length(sequence_length, max(2, self.length + 1), "a string, its separator and a token of its copy")

    def row(self, generator: np.random.Generator, sequence_length: int, vocab_size: int) -> np.ndarray:
        """Input ids and labels, int64 [2, T]."""
        size = self.length or sequence_length // 2
        episodes = -(-(sequence_length + 1) // (2 * size + 1))
        strings = generator.integers(1, vocab_size, size=(episodes, size))
        separators = np.zeros((episodes, 1), dtype=np.int64)
        tokens = np.concatenate([strings, separators, strings], axis=1).ravel()[: sequence_length + 1]
        asked = np.concatenate([np.zeros(size + 1, dtype=bool), np.ones(size, dtype=bool)])
        labels = np.where(np.tile(asked, episodes)[: sequence_length + 1], tokens, NO_TARGET)
        return np.stack([tokens[:-1], labels[1:]])


@dataclass(frozen=True, kw_only=True)
class Induction:
    """Random tokens; a marker stands among them and again at the end, where the token after it is the one target.

    The marker is token 0. It stands anywhere before the last two tokens, with equal chances.
    """

    prefix_closed: ClassVar[bool] = False

    def check(self, sequence_length: int, vocab_size: int) -> None:
        refuse_vocabulary(vocab_size, 3, "a marker and two tokens after it")
        refuse_length(sequence_length, 3, "the marker, what follows it and the marker again")

    def row(self, generator: np.random.Generator, sequence_length: int, vocab_size: int) -> np.ndarray:
        """Input ids and labels, int64 [2, T]."""
        tokens = generator.integers(1, vocab_size, size=sequence_length)
        place = int(generator.integers(sequence_length - 2))
        tokens[[place, -1]] = 0
        labels = np.full(sequence_length, NO_TARGET)
        labels[-1] = tokens[place + 1]
        return np.stack([tokens, labels])
