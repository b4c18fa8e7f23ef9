"""How far a run has come."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a checkpoint keeps besides the state of the engine.

    Attributes:
        step: optimizer steps made.
        consumed_samples: rows they were made from.
        skipped: (first, last) sample of each range left out, as `data/skipped.py` keeps them. Where the run stands in
            its data follows from this and `consumed_samples`, on any number of ranks.
        rows: of each corpus that samples are numbered over; empty where a checkpoint does not say.
        health: what steps are judged by (`training/health.py`).
    """

    step: int = 0
    consumed_samples: int = 0
    skipped: tuple[tuple[int, int], ...] = ()
    rows: tuple[int, ...] = ()
    health: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "skipped": [list(samples) for samples in self.skipped],
            "rows": list(self.rows),
            "health": self.health,
        }


def refuse_other_data(progress: Progress, rows: tuple[int, ...], origin: Path, *, own: bool) -> None:
    """Raises ValueError where the samples that `progress` counts are not those of this run's corpora.

    Args:
        rows: of each corpus of this run.
        origin: the checkpoint that `progress` is from.
        own: it is one of this run, whose data stay as they are; a run that begins from another's may have other data,
            if they reach as far.
    """
    if not progress.rows or progress.rows == rows:
        return
    if own:
        raise ValueError(
            f"data.corpora: {_listed(rows)} rows, but {origin} was trained on {_listed(progress.rows)}, so that a "
            "sample would be another one here; put the corpora back, or choose another name for this run"
        )
    if progress.consumed_samples > sum(rows):
        raise ValueError(
            f"data.corpora: {_listed(rows)} rows, but {origin} has consumed {progress.consumed_samples} samples of "
            "other data; give it data that reach as far, or the data it was trained on"
        )


def _listed(rows: tuple[int, ...]) -> str:
    return " + ".join(f"{count}" for count in rows)
