"""Multi-query associative recall (Arora et al., 2023, "Zoology", arXiv 2312.04927)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data.synthetic.task import NO_TARGET, refuse_below


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Key-value pairs, then the keys again in random order, each to be answered with its value.

    Keys come from the lower half of the vocabulary, values from the upper half. Every value is a target where
    its key is asked for, and nothing else is.

    Attributes:
        pairs: pairs shown in a row; the rest of the row asks for them, each as often as there is room.
        gap: tokens between the last pair and the first question, random values without a key.
    """

    prefix_closed: ClassVar[bool] = False

    pairs: int = 8
    gap: int = 0

    def check(self, sequence_length: int, vocab_size: int) -> None:
        refuse_below(0, gap=self.gap)
        if not 1 <= self.pairs <= vocab_size // 2:
            raise ValueError(
                f"data.options.pairs: {self.pairs}; must be 1 to half the vocabulary ({vocab_size}), the keys; "
                "show fewer pairs or raise model.vocab_size"
            )
        needed = 2 * self.pairs + self.gap + 2
        if sequence_length < needed:
            raise ValueError(
                f"data.sequence_length: {sequence_length}; must hold {self.pairs} pairs, the gap and a question, "
                f"{needed} tokens; lengthen it or show fewer pairs"
            )

    def row(self, generator: np.random.Generator, sequence_length: int, vocab_size: int) -> np.ndarray:
        """Input ids and labels, int64 [2, T]."""
        half, shown = vocab_size // 2, 2 * self.pairs
        keys = generator.permutation(half)[: self.pairs]
        values = half + generator.integers(half, size=self.pairs)
        rounds = -(-sequence_length // shown)
        asked = np.concatenate([np.arange(self.pairs), *(generator.permutation(self.pairs) for _ in range(rounds))])
        tokens = np.stack([keys[asked], values[asked]], axis=1).ravel()
        between = half + generator.integers(half, size=self.gap)
        tokens = np.concatenate([tokens[:shown], between, tokens[shown:]])[: sequence_length + 1]
        labels = tokens[1:].copy()
        labels[: shown + self.gap] = NO_TARGET  # what has not been shown cannot be known
        labels[shown + self.gap + 1 :: 2] = NO_TARGET  # nor which key is asked for next
        return np.stack([tokens[:-1], labels])
