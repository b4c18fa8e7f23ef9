"""What a generated task is."""

from typing import ClassVar, Protocol

import numpy as np

NO_TARGET = -100


class GeneratedTask(Protocol):
    """A frozen dataclass whose fields are its settings, whole numbers all.

    Attributes:
        prefix_closed: whether the beginning of a row is what a shorter row could be.
    """

    prefix_closed: ClassVar[bool]

    def check(self, sequence_length: int, vocab_size: int) -> None:
        """Raises ValueError, "data.KEY: value; requirement; way out", where no such row exists."""
        ...

    def row(self, generator: np.random.Generator, sequence_length: int, vocab_size: int) -> np.ndarray:
        """Input ids and labels, int64 `[2, T]`; labels are NO_TARGET where nothing is asked."""
        ...


def refuse_vocabulary(vocab_size: int, needed: int, what: str) -> None:
    """Raises ValueError unless the vocabulary has `needed` tokens."""
    if vocab_size < needed:
        raise ValueError(f"model.vocab_size: {vocab_size}; {what} need {needed} tokens; raise it to at least {needed}")


def refuse_length(sequence_length: int, needed: int, what: str) -> None:
    """Raises ValueError unless a row has `needed` tokens."""
    if sequence_length < needed:
        raise ValueError(f"data.sequence_length: {sequence_length}; {what} take {needed} tokens; lengthen it")


def refuse_below(minimum: int, **settings: int) -> None:
    """Raises ValueError unless every setting is at least `minimum`."""
    for key, value in settings.items():
        if value < minimum:
            raise ValueError(f"data.options.{key}: {value}; must be at least {minimum}; raise it")
