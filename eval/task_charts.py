"""What evaluation tasks found, for a run's report: figures, their curves, heat maps, and loss by position.

A task may hand in a `heat_map`, a list of [length, depth, share], and `loss_by_position`, a list of [first, last + 1,
nats, nats in windows or null] (`eval/tasks/retrieval.py`, `eval/tasks/length_extrapolation.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from eval.charts import Chart, step_axis
from eval.curves import COMPACT, linear_ticks
from eval.evaluations import Evaluation
from eval.inline_svg import NARROW, PALETTE, render_svg
from eval.run_record import RunRecord
from eval.task_table import Value, leading, task_table, values_of


class HeatMap(NamedTuple):
    """`cells[depth][length]`, shares, None where nothing was asked; depths from the first thing said to the last."""

    task: str
    source: str
    lengths: list[str]
    depths: list[str]
    cells: list[list[float | None]]


class Found(NamedTuple):
    """Metrics of a task, and where they come from."""

    task: str
    source: str
    metrics: Mapping[str, Any]


def task_section(run: RunRecord) -> dict[str, Any]:
    """What the template shows of a run's tasks; empty where it was asked none."""
    if not run.evaluations:
        return {}
    found = latest(run.evaluations)
    return {
        "lines": task_table(run.evaluations),
        "heat_maps": heat_maps(found),
        "charts": [*step_charts(run), *position_charts(found)],
    }


def latest(evaluations: Sequence[Evaluation]) -> list[Found]:
    """The last result of each task, in training and since."""
    last = {
        (one.in_training, task): Found(task, f"step {one.step:,}, {one.source}", metrics)
        for one in evaluations
        for task, metrics in one.results.items()
    }
    return list(last.values())


def step_charts(run: RunRecord) -> list[Chart]:
    """The first metric of each task over the steps, where it was asked at several."""
    found = values_of(run.evaluations)
    charts = []
    for number, metric in enumerate(leading(found)):
        if len(found[metric]) > 1:
            name, title = f"task-steps-{number}", f"{metric.task}: {metric.name}"
            svg = render_svg(partial(_draw_steps, run, found[metric]), name, title, NARROW)
            charts.append(Chart(name, title, metric.asked, svg, None))
    return charts


def _draw_steps(run: RunRecord, values: Sequence[Value], axes: Axes) -> None:
    step_axis(run, axes)
    style: dict[str, Any] = {"color": PALETTE["validation"], "marker": "o", "markersize": 3.5, "clip_on": False}
    axes.plot([value.step for value in values], [value.value for value in values], gid="task", **style)
    linear_ticks(axes)


def heat_maps(found: Sequence[Found]) -> list[HeatMap]:
    return [_heat_map(one) for one in found if one.metrics.get("heat_map")]


def _heat_map(found: Found) -> HeatMap:
    shares = {(length, depth): share for length, depth, share in found.metrics["heat_map"]}
    lengths, depths = (sorted({key[axis] for key in shares}) for axis in (0, 1))
    return HeatMap(
        found.task,
        found.source,
        [f"{length:,}" for length in lengths],
        [f"{depth:.0%}" for depth in depths],
        [[shares.get((length, depth)) for length in lengths] for depth in depths],
    )


def position_charts(found: Sequence[Found]) -> list[Chart]:
    """A chart for each result with a loss by position."""
    return list(_position_charts(found))


def _position_charts(found: Sequence[Found]) -> Iterator[Chart]:
    for number, one in enumerate(found):
        buckets = one.metrics.get("loss_by_position")
        if buckets:
            name, title = f"task-position-{number}", f"{one.task}: loss by position"
            svg = render_svg(partial(_draw_positions, buckets), name, title, NARROW)
            yield Chart(name, title, f"{one.source}; nats, each curve of the same tokens", svg, None)


def _draw_positions(buckets: Sequence[Sequence[Any]], axes: Axes) -> None:
    """Nats over the position, in the whole row, and in windows of the trained length where they begin."""
    first, stop, whole, windows = (
        np.array([bucket[n] if bucket[n] is not None else np.nan for bucket in buckets], dtype=np.float64)
        for n in range(4)
    )
    middle = np.sqrt(np.maximum(first, 1) * stop)
    axes.set_xscale("log")
    axes.plot(middle, whole, color=PALETTE["training"], label="whole row", marker="o", markersize=2.5)
    beyond = np.isfinite(windows)
    axes.plot(middle[beyond], windows[beyond], color=PALETTE["validation"], label="windows", marker="o", markersize=2.5)
    if beyond.any():
        axes.axvline(first[beyond][0], color=PALETTE["event"], linestyle="--", linewidth=1.0)
    ticks = stop[:: max(1, -(-len(stop) // 7))]
    axes.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(COMPACT)
    axes.set_xlabel("position; dashed: the trained length" if beyond.any() else "position")
    axes.legend(loc="upper right")
