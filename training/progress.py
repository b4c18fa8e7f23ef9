"""How far a run has come."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a checkpoint keeps besides the state of the engine.

    Attributes:
        step: optimizer steps made.
        consumed_samples: rows they were made from.
        skipped: (first, last) sample of each range left out, as `data/skipped.py` keeps them. Where the run stands in
            its data follows from this and `consumed_samples`, on any number of ranks.
        health: what steps are judged by (`training/health.py`).
    """

    step: int = 0
    consumed_samples: int = 0
    skipped: tuple[tuple[int, int], ...] = ()
    health: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        skipped = [list(samples) for samples in self.skipped]
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "skipped": skipped,
            "health": self.health,
        }
