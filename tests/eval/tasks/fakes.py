"""Models that answer by rule, so that a task's figures are known beforehand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval.model import Row, Scores

Rule = Callable[[Row, int], float]
"""Nats of a label at a position of a row; the label is the most likely token below `SURE`."""

SURE = 0.5


@dataclass
class Fake:
    """`eval.model.EvalModel` by a rule; it remembers how many rows each call asked about."""

    rule: Rule
    vocab_size: int = 120
    tokenizer: Any = None
    longest: int | None = None
    generates: bool = False
    calls: list[int] = field(default_factory=list)

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        self.calls.append(len(rows))
        found = []
        for row in rows:
            nll = np.array([self.rule(row, t) if row.labels[t] >= 0 else 0.0 for t in range(len(row.labels))])
            found.append(Scores(nll, (nll < SURE) & (row.labels >= 0)))
        return found


def perfect(row: Row, t: int) -> float:
    return 0.0


def at_random(share: float, seed: int = 0) -> Rule:
    """Right with probability `share`, whatever is asked."""
    generator = np.random.default_rng(seed)
    return lambda row, t: 0.0 if generator.random() < share else 1.0


def short_memory(tokens: int) -> Rule:
    """Knows what stands among the last so many tokens: a label is right where it stands there."""
    return lambda row, t: 0.0 if row.labels[t] in row.input_ids[max(0, t - tokens) : t] else 1.0
