"""What tasks found of a run's models, wherever it was written.

While it trained, in metrics.jsonl; and since, by `python -m eval`: in evaluations/ where a checkpoint was named, in
results.json where the run was. A reader of several runs or of one asks here alone.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.checkpoint import MANIFEST, checkpoint_name

PREFIX = "task/"
"""Of the keys of metrics.jsonl that hold what tasks found: task/NAME/METRIC."""

PLACES = ("evaluations/*.json", "results.json")
"""Where the files of `python -m eval` lie in a run directory."""

Left = tuple[int, int]
"""A run that went back: the step that it went on from, and the last one that it had come to, which it left."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """
    Attributes:
        step: of the model that was asked.
        in_training: between two steps of the run; else by `python -m eval`, of a checkpoint.
        source: the same in words, with the file and its date.
        results: task -> metric -> value; beside numbers lists, as a heat map is.
        settings: task -> what it was asked with, where that is written; under "" what lm-eval's tasks were.
    """

    step: int
    in_training: bool
    source: str
    results: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]


def read_evaluations(
    run: Path, rows: Iterable[Mapping[str, Any]], left: Sequence[Left], notes: list[str]
) -> tuple[Evaluation, ...]:
    """All evaluations that are of the run as it stands, steps ascending, at one step in the order of their making.

    Args:
        run: the run directory.
        rows: of its metrics.jsonl, in the order they were written, those that still count.
        left: where it went back.
        notes: takes a line for each file that is left out: it cannot be read, or is of weights that the run left.
    """
    found = [_of_row(row) for row in rows]
    dated = []
    for path in sorted(path for place in PLACES for path in run.glob(place)):
        name = str(path.relative_to(run))
        try:
            record = _read_record(path)
            step = _step(path, record)
            _require_present(run, step, str(record["digest"]), left)
        except (OSError, ValueError) as error:
            notes.append(f"{name}: {error}; it was left out.")
            continue
        dated.append((str(record["date"]), _of_record(step, name, record)))
    found += [evaluation for _, evaluation in sorted(dated, key=lambda pair: pair[0])]
    return tuple(sorted(found, key=lambda evaluation: evaluation.step))


def _of_row(row: Mapping[str, Any]) -> Evaluation:
    results: dict[str, dict[str, Any]] = {}
    for key, value in row.items():
        if key.startswith(PREFIX):
            task, _, metric = key.removeprefix(PREFIX).partition("/")
            results.setdefault(task, {})[metric] = value
    return Evaluation(step=row["step"], in_training=True, source="in training", results=results, settings={})


def _of_record(step: int, name: str, record: Mapping[str, Any]) -> Evaluation:
    settings = dict(record["settings"])
    own = {task: settings.pop(task) for task in record["results"] if task in settings}
    source = f"{name} of {record['date'][:10]}"
    return Evaluation(
        step=step, in_training=False, source=source, results=record["results"], settings=own | {"": settings}
    )


def _read_record(path: Path) -> dict[str, Any]:
    """The file of an evaluation; ValueError if it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot be read ({error}); evaluate again") from error
    kinds = {"model": str, "digest": str, "date": str, "settings": dict, "results": dict}
    wrong = [
        key for key, kind in kinds.items() if not isinstance(record, dict) or not isinstance(record.get(key), kind)
    ]
    wrong = wrong or [f"results.{task}" for task, found in record["results"].items() if not isinstance(found, dict)]
    if wrong:
        raise ValueError(f"holds no {', '.join(wrong)} as python -m eval writes it; evaluate again")
    return record


def _step(path: Path, record: Mapping[str, Any]) -> int:
    """From the file's name, or else from its model's; ValueError if neither is a checkpoint's."""
    for name in (path.name, Path(record["model"]).name):
        if matched := re.match(r"step_(\d{8,})(?!\d)", name):
            return int(matched[1])
    raise ValueError(
        f"is of {record['model']}, which is no step of the run; evaluate the run or one of its checkpoints"
    )


def _require_present(run: Path, step: int, digest: str, left: Sequence[Left]) -> None:
    """Raises ValueError if the model with this digest is not what the run had, or has come to since, at this step.

    Its checkpoint tells. Where that was removed, a step that the run never left is its own.
    """
    manifest = run / "checkpoints" / checkpoint_name(step) / MANIFEST
    if manifest.is_file():
        if hashlib.sha256(manifest.read_bytes()).hexdigest() != digest:
            raise ValueError(f"is of other weights than checkpoints/{checkpoint_name(step)}; evaluate that again")
        return
    for first, last in left:
        if first < step <= last:
            raise ValueError(
                f"is of step {step:,}, and the run went back from step {last:,} to {first:,}; evaluate a checkpoint "
                "that it has"
            )


def asked_otherwise(settings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The names of settings that are not the same in all of these."""
    for key in dict.fromkeys(key for one in settings for key in one):
        if any(one.get(key) != settings[0].get(key) for one in settings):
            yield key
