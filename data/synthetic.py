"""Generated tasks as training data: `data.source: synthetic:NAME`, settings in `data.options`.

A row is one document. It is a pure function of (seed, split, row), so the order, resumption and blends over ranks are
those of any corpus, and nothing is written.
"""

import difflib
import hashlib
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

NO_TARGET = -100
VALID_ROWS = 512
TRAIN_ROWS = 1 << 40
"""So many that no run sees one twice."""


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Multi-query associative recall (Arora et al., 2023, "Zoology"): key-value pairs, then the keys again in random
    order, each to be answered with its value.

    Keys come from the lower half of the vocabulary, values from the upper half. Every value is a target where
    its key is asked for, and nothing else is.

    Attributes:
        pairs: pairs shown in a row; the rest of the row asks for them, each as often as there is room.
    """

    pairs: int = 8

    def check(self, sequence_length: int, vocab_size: int) -> None:
        if not 1 <= self.pairs <= vocab_size // 2:
            raise ValueError(
                f"data.options.pairs: {self.pairs}; must be 1 to half the vocabulary ({vocab_size}), the keys; "
                "show fewer pairs or raise model.vocab_size"
            )
        if sequence_length < 2 * self.pairs + 2:
            raise ValueError(
                f"data.sequence_length: {sequence_length}; must hold {self.pairs} pairs and a question, "
                f"{2 * self.pairs + 2} tokens; lengthen it or show fewer pairs"
            )

    def row(self, generator: np.random.Generator, sequence_length: int, vocab_size: int) -> np.ndarray:
        """Input ids and labels, int64 [2, T]."""
        half = vocab_size // 2
        keys = generator.permutation(half)[: self.pairs]
        values = half + generator.integers(half, size=self.pairs)
        rounds = -(-sequence_length // (2 * self.pairs))
        asked = np.concatenate([np.arange(self.pairs), *(generator.permutation(self.pairs) for _ in range(rounds))])
        tokens = np.stack([keys[asked], values[asked]], axis=1).ravel()[: sequence_length + 1]
        labels = tokens[1:].copy()
        labels[: 2 * self.pairs] = NO_TARGET  # what has not been shown cannot be known
        labels[1::2] = NO_TARGET  # nor which key is asked for next
        return np.stack([tokens[:-1], labels])


TASKS: dict[str, type[Recall]] = {"recall": Recall}


class SyntheticRows:
    """The rows of one split of a task, int64 [3, T] each: input ids, labels, positions."""

    def __init__(
        self,
        source: str,
        options: dict[str, int],
        *,
        split: Literal["train", "valid"],
        seed: int,
        sequence_length: int,
        vocab_size: int,
    ) -> None:
        self._task = find_task(source, options)
        self._task.check(sequence_length, vocab_size)
        self._length, self._vocab_size = sequence_length, vocab_size
        digest = hashlib.blake2b(f"{source}/{split}/{seed}".encode(), digest_size=16).digest()
        self._key = int.from_bytes(digest, "little")
        self._rows = TRAIN_ROWS if split == "train" else VALID_ROWS

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, 0, row]))
        ids_and_labels = self._task.row(generator, self._length, self._vocab_size)
        return np.concatenate([ids_and_labels, np.arange(self._length)[None]])


def find_task(source: str, options: dict[str, int]) -> Recall:
    """The task that `synthetic:NAME` and its options describe. Raises ValueError, the nearest name shown."""
    prefix, _, name = source.partition(":")
    if prefix != "synthetic" or name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        known = ", ".join(f"synthetic:{task}" for task in TASKS)
        hint = f"did you mean synthetic:{close[0]}?" if close else f"choose from {known}"
        raise ValueError(f"source: {source!r}; there is no such task; {hint}")
    names = [field.name for field in fields(TASKS[name])]
    unknown = options.keys() - set(names)
    if unknown:
        raise ValueError(f"options: {sorted(unknown)}; synthetic:{name} takes {', '.join(names)}; remove the others")
    settings: dict[str, Any] = dict(options)
    return TASKS[name](**settings)
