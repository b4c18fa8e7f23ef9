"""Several runs on one page: curves laid over each other, final figures, evaluations, events, settings that differ.

Part of `python -m eval.report RUN RUN ...`.
"""

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from ruamel.yaml import YAML

from eval.charts import Chart
from eval.curves import (
    COMPACT,
    MEDIAN_POINTS,
    MEDIAN_ROWS,
    Values,
    column,
    linear_ticks,
    log_ticks,
    medians,
    spread,
)
from eval.inline_svg import NARROW, RUN_COLORS, WIDE, render_svg
from eval.page import render_page, write_page
from eval.quantity import compact, duration
from eval.run_record import Row, RunRecord, flatten, read_run
from eval.task_table import Metric, Value, compare_tasks, leading, not_alike, values_of

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
"""Line styles, the next one for each round through the colours."""

SECTIONS = ("results", "evaluations", "curves", "configuration", "events")
"""Of the page, in order."""


Curve = tuple[Values, Values]
"""Tokens trained on, and a value at each."""


class Measure(NamedTuple):
    """A row of the table: one number of every run, and which end of it is good (0: neither)."""

    label: str
    read: Callable[[RunRecord], float | None]
    show: Callable[[float], str]
    better: int = 0


def write_comparison(run_directories: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page, replacing an older one in one step, and returns where it is.

    Args:
        run_directories: two or more; one without a training step yet is named in a note and left out. The page itself,
            which `runs/*` names the second time, is not one.
        output: the file; comparison.html beside the first run if None.

    Raises:
        ValueError: fewer than two of them hold a run with a training step.
    """
    page = output or run_directories[0].resolve().parent / "comparison.html"
    run_directories = [directory for directory in run_directories if directory.resolve() != page.resolve()]
    runs, notes = [], []
    for directory in run_directories:
        try:
            runs.append(read_run(directory))
        except ValueError as error:
            notes.append(str(error))
    if len(runs) < 2:
        raise ValueError(
            f"{len(runs)} of {len(run_directories)} can be compared; name at least two: {'; '.join(notes)}"
        )
    return write_page(render(runs, notes), page)


def render(runs: Sequence[RunRecord], notes: Sequence[str] = ()) -> str:
    """The page as HTML that needs nothing beside itself."""
    names = run_names(runs)
    evaluations = [run.evaluations for run in runs]
    content: dict[str, Any] = {
        "results": _table(runs),
        "evaluations": compare_tasks(evaluations),
        "configuration": differences(runs),
        "events": _events(names, runs),
    }
    return render_page(
        "comparison.html",
        **content,
        names=names,
        statuses=[run.status for run in runs],
        styles=[_style(i) for i in range(len(runs))],
        notes=[*notes, *(f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.notes)],
        charts=_charts(names, runs),
        task_charts=_task_charts(names, runs),
        not_alike=not_alike(evaluations),
        sections=[(name, name.capitalize()) for name in SECTIONS if content.get(name, True)],
    )


def run_names(runs: Sequence[RunRecord]) -> list[str]:
    """The directories' names, with as many of their parents as tell them apart."""
    paths = [run.path.resolve() for run in runs]
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(key, value in each run) of every setting that is not the same in all; absent settings are empty."""
    yaml = YAML(typ="safe", pure=True)
    settings = [dict(flatten(yaml.load(io.StringIO(run.config)) or {})) for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    values = ((key, [one.get(key, "") for one in settings]) for key in keys)
    return [(key, found) for key, found in values if len(set(found)) > 1]


def _last(rows: Sequence[Row], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def _best(rows: Sequence[Row], key: str) -> float | None:
    return min((row[key] for row in rows if row.get(key) is not None), default=None)


def _median_of(key: str, run: RunRecord) -> float | None:
    values = [row[key] for row in run.training if row.get(key)]
    return median(values) if values else None


MEASURES = (
    Measure("Steps", lambda run: run.training[-1]["step"], "{:,.0f}".format),
    Measure("Tokens trained", lambda run: run.training[-1].get("tokens"), compact),
    Measure("Parameters", lambda run: sum(row["parameters"] for row in run.layers) or None, compact),
    Measure("Bits per byte, last", lambda run: _last(run.validation, "val_bits_per_byte"), "{:.4f}".format, -1),
    Measure("Validation loss, last", lambda run: _last(run.validation, "val_loss"), "{:.4f}".format, -1),
    Measure("Validation loss, best", lambda run: _best(run.validation, "val_loss"), "{:.4f}".format, -1),
    Measure("Training loss, last", lambda run: _last(run.training, "loss"), "{:.4f}".format, -1),
    Measure("Tokens per second, median", partial(_median_of, "tokens_per_second"), compact, 1),
    Measure("MFU, median", partial(_median_of, "mfu"), "{:.3f}".format, 1),
    Measure("Peak memory, GB", lambda run: max(r.get("memory_gb") or 0 for r in run.training) or None, compact, -1),
    Measure("Time in steps", lambda run: run.seconds_in_steps or None, duration),
)


def _table(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The measures that any run has; the best of each marked."""
    rows = []
    for label, read, show, better in MEASURES:
        values = [read(run) for run in runs]
        known = [value for value in values if value is not None]
        if known:
            best = max(known, key=lambda value: better * value) if better and len(set(known)) > 1 else None
            cells = [("" if value is None else show(value), value is not None and value == best) for value in values]
            rows.append({"label": label, "cells": cells})
    return rows


def _events(names: Sequence[str], runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Every event but the checkpoints', which are counted, by run and in the order of their writing."""
    rows = []
    for name, run in zip(names, runs, strict=True):
        saved = Counter(row["event"] for row in run.events)["saved"]
        if saved:
            rows.append({"run": name, "step": "", "event": "saved", "detail": f"{saved:,} checkpoints"})
        rows += [{"detail": ""} | row | {"run": name} for row in run.events if row["event"] != "saved"]
    return rows


def _style(index: int) -> dict[str, Any]:
    """Colour and dashes of a run: never the same twice within 32 runs."""
    name, color = list(RUN_COLORS.items())[index % len(RUN_COLORS)]
    return {"variable": name, "color": color, "linestyle": DASHES[index // len(RUN_COLORS) % len(DASHES)]}


def _charts(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Chart]:
    drawings = [
        ("loss", "Training loss", "running median, nats per token, logarithmic", "training", "loss", True),
        ("bits-per-byte", "Bits per byte", "held-out text", "validation", "val_bits_per_byte", True),
        ("validation-loss", "Validation loss", "held-out nats per token", "validation", "val_loss", True),
        ("gradient-norm", "Gradient norm", "running median, before clipping", "training", "grad_norm", True),
        ("throughput", "Throughput", "running median, tokens per second", "training", "tokens_per_second", False),
    ]
    charts = []
    for i, (name, title, caption, kind, key, log) in enumerate(drawings):
        curves = [_curve(run, kind, key) for run in runs]
        if any(np.isfinite(values).any() for _, values in curves):
            draw = partial(_overlay, names, curves, log)
            wide = render_svg(draw, f"{name}-wide", title, WIDE) if i == 0 else None
            charts.append(Chart(name, title, caption, render_svg(draw, name, title, NARROW), wide))
    return charts


def _curve(run: RunRecord, kind: str, key: str) -> Curve:
    rows = getattr(run, kind)
    tokens, values = _tokens(run, column(rows, "step")), column(rows, key)
    if kind == "training" and len(values) >= MEDIAN_ROWS:
        centres = spread(len(values), MEDIAN_POINTS)
        return tokens[centres], medians(values, centres, len(values) // 100)
    return tokens, values


def _task_charts(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Chart]:
    """The first metric of each task that any run was asked at several steps."""
    found = [values_of(run.evaluations) for run in runs]
    several = dict.fromkeys(metric for values in found for metric in values)
    charts = []
    for number, metric in enumerate(leading(several)):
        if any(len(values.get(metric, [])) > 1 for values in found):
            name, title = f"task-{number}", f"{metric.task}: {metric.name}"
            curves = [_task_curve(run, values, metric) for run, values in zip(runs, found, strict=True)]
            draw = partial(_overlay, names, curves, None)
            charts.append(Chart(name, title, metric.asked, render_svg(draw, name, title, NARROW), None))
    return charts


def _task_curve(run: RunRecord, found: Mapping[Metric, Sequence[Value]], metric: Metric) -> Curve:
    values = found.get(metric, [])
    steps = np.array([value.step for value in values], dtype=np.float64)
    return _tokens(run, steps), np.array([value.value for value in values], dtype=np.float64)


def _overlay(names: Sequence[str], curves: Sequence[Curve], log: bool | None, axes: Axes) -> None:
    """A curve of every run over the tokens trained on, which runs of any batch size share.

    Args:
        log: whether the axis is logarithmic or begins at zero; None: neither, and every point is marked.
    """
    for i, (name, (tokens, values)) in enumerate(zip(names, curves, strict=True)):
        style: dict[str, Any] = {"color": _style(i)["color"], "linestyle": _style(i)["linestyle"]}
        if log is None:
            style |= {"marker": "o", "markersize": 3.5}
        axes.plot(tokens, values, label=name, gid=f"run-{i}", **style)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(COMPACT)
    if log:
        axes.set_yscale("log")
        log_ticks(axes, "y", np.concatenate([values for _, values in curves]))
    else:
        linear_ticks(axes)
    if log is False:
        axes.set_ylim(bottom=0)
    if len(names) <= 8:
        axes.legend(loc="best")


def _tokens(run: RunRecord, steps: Values) -> Values:
    """Tokens trained after these steps, between logged ones by proportion."""
    known_steps = np.concatenate([[0.0], column(run.training, "step")])
    known_tokens = np.concatenate([[0.0], column(run.training, "tokens")])
    return np.interp(steps, known_steps, known_tokens)
