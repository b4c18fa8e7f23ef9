"""Generated tasks as training data: `data.source: synthetic:NAME`, settings in `data.options`.

A row is one document. It is a pure function of (seed, split, row), so the order, resumption and blends over ranks are
those of any corpus, and nothing is written. `eval/tasks` asks trained models the same at lengths of its own.
"""

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import numpy as np

from data.synthetic.copying import Copying, Induction
from data.synthetic.recall import Recall
from data.synthetic.retrieval import Needle, Passkey
from data.synthetic.state_tracking import A5, S3, S5, Dyck, ModularArithmetic, Parity
from data.synthetic.task import NO_TARGET, GeneratedTask

__all__ = ["NO_TARGET", "TASKS", "TRAIN_ROWS", "VALID_ROWS", "GeneratedTask", "SyntheticRows", "find_task"]

VALID_ROWS = 512
TRAIN_ROWS = 1 << 40
"""So many that no run sees one twice."""

TASKS: dict[str, type[Any]] = {
    "recall": Recall,
    "copying": Copying,
    "induction": Induction,
    "passkey": Passkey,
    "needle": Needle,
    "parity": Parity,
    "s3": S3,
    "a5": A5,
    "s5": S5,
    "modular_arithmetic": ModularArithmetic,
    "dyck": Dyck,
}


class SyntheticRows:
    """The rows of one split of a task, int64 [3, T] each: input ids, labels, positions."""

    def __init__(
        self,
        source: str,
        options: Mapping[str, int],
        *,
        split: Literal["train", "valid"],
        seed: int,
        sequence_length: int,
        vocab_size: int,
    ) -> None:
        self._task = find_task(source, options)
        self._task.check(sequence_length, vocab_size)
        self._length, self._vocab_size = sequence_length, vocab_size
        self._key = stream_key(f"{source}/{split}/{seed}")
        self._rows = TRAIN_ROWS if split == "train" else VALID_ROWS

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> np.ndarray:
        ids_and_labels = self._task.row(row_generator(self._key, row), self._length, self._vocab_size)
        return np.concatenate([ids_and_labels, np.arange(self._length)[None]])


def stream_key(name: str) -> int:
    """The key of a stream of rows: other names give rows that have nothing in common."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")


def row_generator(key: int, row: int) -> np.random.Generator:
    """What row number `row` of a stream draws from."""
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, row]))


def find_task(source: str, options: Mapping[str, int]) -> GeneratedTask:
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
        takes = f"takes {', '.join(names)}" if names else "has none"
        raise ValueError(f"options: {sorted(unknown)}; synthetic:{name} {takes}; remove the others")
    settings: dict[str, Any] = dict(options)
    return TASKS[name](**settings)
