"""What a run directory says about its run: metrics, evaluations, layers, samples, environment, configuration."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from eval.evaluations import PREFIX, Evaluation, Left, read_evaluations
from models.restore import read_metrics

Row = dict[str, Any]


class Sample(NamedTuple):
    """Text the model wrote after `step` steps."""

    step: int
    text: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run.

    Attributes:
        path: the run directory.
        training, validation: the rows of metrics.jsonl of either kind, one a step, steps ascending.
        tasks: the rows of evaluation tasks, keys `task/NAME/METRIC`, in the order they were written.
        evaluations: these, and those of its checkpoints, steps ascending.
        events: the event rows, in the order they were written.
        repeated_steps: logged steps that were computed more than once, because a checkpoint lay behind them.
        notes: what a reader of the figures should know: damaged lines, missing files, evaluations left out.
        layers: the rows of layers.json.
        samples: samples/step_*.txt, steps ascending.
        environment: environment.json.
        config: config.yaml as it stands.
    """

    path: Path
    training: tuple[Row, ...]
    validation: tuple[Row, ...]
    tasks: tuple[Row, ...]
    evaluations: tuple[Evaluation, ...]
    events: tuple[Row, ...]
    repeated_steps: int
    notes: tuple[str, ...]
    layers: tuple[Row, ...]
    samples: tuple[Sample, ...]
    environment: dict[str, Any]
    config: str

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def status(self) -> str:
        """`finished`, `interrupted`, `failed` or, where the last event that is no checkpoint was none of these,
        `unfinished`: it goes on, or was killed."""
        last = next((row["event"] for row in reversed(self.events) if row["event"] != "saved"), "")
        last = "failed" if last == "hang" else last
        return last if last in ("finished", "interrupted", "failed") else "unfinished"

    @property
    def seconds_in_steps(self) -> float:
        """Of all steps, each logged one standing for those since the one before."""
        steps = [0, *(row["step"] for row in self.training)]
        gaps = (after - before for before, after in itertools.pairwise(steps))
        return sum(gap * (row.get("step_time") or 0.0) for row, gap in zip(self.training, gaps, strict=True))


def flatten(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of a nested mapping as (dotted key, value in words)."""
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "none" if value in (None, "") else str(value)


def read_run(path: Path) -> RunRecord:
    """Reads a run directory; what is missing beside the metrics becomes a note.

    Raises:
        ValueError: `path` is no run directory, or its metrics hold no training step.
    """
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{path}: no run directory, it has no metrics.jsonl; name a directory that train.py wrote")
    notes: list[str] = []
    lines = read_metrics(path)
    found = _sort_metrics(lines, notes)
    if not found.training:
        raise ValueError(f"{metrics}: holds no training step yet; train first, or wait for the first logged step")
    layers = _read_optional(path / "layers.json", notes)
    environment = _read_optional(path / "environment.json", notes)
    config = _read_optional(path / "config.yaml", notes)
    samples = [
        Sample(int(file.stem.removeprefix("step_")), file.read_text(encoding="utf-8"))
        for file in path.glob("samples/step_*.txt")
    ]
    return RunRecord(
        path=path,
        training=tuple(found.training[step] for step in sorted(found.training)),
        validation=tuple(found.validation[step] for step in sorted(found.validation)),
        tasks=tuple(found.tasks),
        evaluations=read_evaluations(path, found.tasks, found.left, notes),
        events=tuple(found.events),
        repeated_steps=found.repeated,
        notes=tuple(notes),
        layers=tuple(json.loads(layers or "[]")),
        samples=tuple(sorted(samples)),
        environment=json.loads(environment or "{}"),
        config=config,
    )


def is_task(row: Row) -> bool:
    """Whether a row of metrics.jsonl holds the results of evaluation tasks."""
    return any(key.startswith(PREFIX) for key in row)


@dataclass
class _Metrics:
    """The rows of metrics.jsonl by kind.

    Attributes:
        training, validation: by step.
        left: where the run went back.
        repeated: training rows that were written again.
    """

    training: dict[int, Row] = field(default_factory=dict)
    validation: dict[int, Row] = field(default_factory=dict)
    tasks: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    repeated: int = 0

    def go_back(self, step: int, reached: int) -> None:
        self.training = {known: row for known, row in self.training.items() if known <= step}
        self.validation = {known: row for known, row in self.validation.items() if known <= step}
        self.tasks = [row for row in self.tasks if row["step"] <= step]
        if step < reached:
            self.left.append((step, reached))


def _sort_metrics(lines: list[tuple[int, Row | None]], notes: list[str]) -> _Metrics:
    """The last row of a step counts. A start or a resume goes back to its checkpoint: rows beyond it are dropped even
    where the run has not come to their steps again."""
    found, seen, reached = _Metrics(), set[int](), 0
    for number, row in lines:
        if row is None:
            last = number == lines[-1][0]
            cut = "the last line is cut off, as a kill leaves it" if last else f"line {number} is damaged"
            notes.append(f"metrics.jsonl: {cut}; it was left out.")
            continue
        step = row["step"]
        if "event" in row:
            found.events.append(row)
            if row["event"] in ("started", "resumed", "rolled back"):
                found.go_back(step, reached)
                reached = step
        elif "val_loss" in row:
            found.validation[step] = row
        elif is_task(row):
            found.tasks.append(row)
        else:
            found.repeated += step in seen
            seen.add(step)
            found.training[step] = row
        reached = max(reached, step)
    return found


def _read_optional(path: Path, notes: list[str]) -> str:
    if not path.is_file():
        notes.append(f"{path.name}: not in the run directory.")
        return ""
    return path.read_text(encoding="utf-8")
