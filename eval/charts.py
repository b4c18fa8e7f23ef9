"""The curves of a run."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from eval.curves import (
    COMPACT,
    MEDIAN_POINTS,
    MEDIAN_ROWS,
    RAW_POINTS,
    ROUND_STEPS,
    Values,
    column,
    extremes,
    linear_ticks,
    log_ticks,
    medians,
    spread,
)
from eval.inline_svg import NARROW, PALETTE, WIDE, render_svg
from eval.quantity import compact
from eval.run_record import RunRecord

MARKED_EVENTS = ("resumed", "interrupted", "rolled back", "spike", "skipped")


class Drawing(NamedTuple):
    """How one chart is drawn."""

    name: str
    title: str
    caption: str
    draw: Callable[[RunRecord, Axes], None]


class Chart(NamedTuple):
    """A drawn chart. `svg` fits a phone and half a laptop page; `wide_svg`, where there is one, the whole page."""

    name: str
    title: str
    caption: str
    svg: str
    wide_svg: str | None


def draw_charts(run: RunRecord) -> list[Chart]:
    """The charts for which the run has data, the most telling first, to be set in pairs below the first one."""
    drawings = list(_drawings(run))
    charts = []
    for i, (name, title, caption, draw) in enumerate(drawings):
        alone = i == 0 or (i == len(drawings) - 1 and i % 2 == 1)
        wide = render_svg(partial(draw, run), f"{name}-wide", title, WIDE) if alone else None
        charts.append(Chart(name, title, caption, render_svg(partial(draw, run), name, title, NARROW), wide))
    return charts


def _drawings(run: RunRecord) -> Iterator[Drawing]:
    yield Drawing("loss", "Loss", "nats per token, logarithmic", _draw_loss)
    yield Drawing("loss-log", "Loss", "both axes logarithmic: a power law is a straight line", _draw_log_loss)
    if run.validation:
        yield Drawing("bits-per-byte", "Bits per byte", "held-out text", _draw_bits_per_byte)
        caption = "held-out nats; context that is used makes it fall"
        yield Drawing("position", "Loss by position", caption, _draw_loss_by_position)
    yield Drawing("learning-rate", "Learning rate", "", _draw_learning_rate)
    yield Drawing("gradient-norm", "Gradient norm", "before clipping, logarithmic", _series("grad_norm", log=True))
    yield Drawing("throughput", "Throughput", "training tokens per second", _series("tokens_per_second"))
    if np.isfinite(column(run.training, "z_loss")).any():
        yield Drawing("z-loss", "z-loss", "mean square of log Z, before its weight", _series("z_loss", log=True))
    if np.isfinite(column(run.training, "mfu")).any():
        yield Drawing("mfu", "Model FLOPs utilisation", "share of the device's peak", _series("mfu"))


def _draw_loss(run: RunRecord, axes: Axes) -> None:
    step_axis(run, axes)
    _loss_curves(run, axes)


def _draw_log_loss(run: RunRecord, axes: Axes) -> None:
    steps = column(run.training, "step")
    axes.set_xscale("log")
    axes.set_xlim(max(1, steps[0]), max(2, steps[-1]))
    log_ticks(axes, "x", steps)
    axes.set_xlabel("step")
    _loss_curves(run, axes, log_steps=True)


def _loss_curves(run: RunRecord, axes: Axes, *, log_steps: bool = False) -> None:
    _plot_noisy(run, axes, "loss", log_steps=log_steps)
    losses = column(run.training, "loss")
    if run.validation:
        losses = np.concatenate([losses, _plot_validation(run, axes, "val_loss")])
    axes.set_yscale("log")
    log_ticks(axes, "y", losses)
    axes.legend(loc="upper right")


def _draw_bits_per_byte(run: RunRecord, axes: Axes) -> None:
    step_axis(run, axes)
    bits = _plot_validation(run, axes, "val_bits_per_byte")
    axes.set_yscale("log")
    log_ticks(axes, "y", bits)


def _draw_loss_by_position(run: RunRecord, axes: Axes) -> None:
    """The first validation, one in the middle, and the last."""
    rows = [row for row in run.validation if row.get("val_loss_by_position")]
    chosen = [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})] if rows else []
    for i, row in enumerate(chosen, start=1):
        start, end, loss = np.asarray(row["val_loss_by_position"], dtype=float).T
        last = i == len(chosen)
        axes.plot(
            np.sqrt((start + 1) * end),  # the middle of positions start to end - 1 on an axis that counts from 1
            loss,
            color=PALETTE["validation"],
            alpha=1.0 if last else 0.2 + 0.2 * i,
            marker="o" if last else None,
            markersize=3.5,
            label=f"step {compact(row['step'])}",
            gid="position" if last else f"position-{i}",
        )
    axes.set_xscale("log")
    log_ticks(axes, "x", [1, *(end for row in chosen for _, end, _ in row["val_loss_by_position"])])
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND_STEPS))
    axes.set_xlabel("tokens read, this one included")
    axes.legend(loc="upper right")


def _draw_learning_rate(run: RunRecord, axes: Axes) -> None:
    step_axis(run, axes)
    rates = column(run.training, "lr")
    kept = extremes(rates, RAW_POINTS)
    axes.plot(column(run.training, "step")[kept], rates[kept], color=PALETTE["training"], gid="training")
    linear_ticks(axes)


def _series(key: str, *, log: bool = False) -> Callable[[RunRecord, Axes], None]:
    """A drawing of one noisy key of the training rows: on a logarithmic axis, or on one from zero."""

    def draw(run: RunRecord, axes: Axes) -> None:
        step_axis(run, axes)
        _plot_noisy(run, axes, key)
        values = column(run.training, key)
        if log:
            axes.set_yscale("log")
            log_ticks(axes, "y", values)
            return
        if np.isfinite(values).any():
            axes.set_ylim(0, 1.1 * np.nanpercentile(values, 99))
        linear_ticks(axes)

    return draw


def _plot_noisy(run: RunRecord, axes: Axes, key: str, *, log_steps: bool = False) -> None:
    """Every row, thin, under the running median of a fiftieth of the run; of few rows a single line."""
    steps, values = column(run.training, "step"), column(run.training, key)
    style: dict[str, Any] = {"color": PALETTE["training"], "label": "training", "gid": "training"}
    if len(values) < MEDIAN_ROWS:
        axes.plot(steps, values, **style)
        return
    reach = len(values) // 100
    kept = extremes(values, RAW_POINTS, log=log_steps)
    axes.plot(steps[kept], values[kept], color=PALETTE["training"], alpha=0.3, linewidth=0.8, gid="training-raw")
    centres = spread(len(values), MEDIAN_POINTS, log=log_steps)
    axes.plot(steps[centres], medians(values, centres, reach), **style)


def _plot_validation(run: RunRecord, axes: Axes, key: str) -> Values:
    values = column(run.validation, key)
    marker = "o" if len(values) <= 60 else None
    style: dict[str, Any] = {"color": PALETTE["validation"], "marker": marker, "markersize": 3.5, "clip_on": False}
    axes.plot(column(run.validation, "step"), values, label="validation", gid="validation", **style)
    return values


def step_axis(run: RunRecord, axes: Axes) -> None:
    """Steps from 0 to the last; resumes and interruptions as dashed lines, checkpoints as marks."""
    num_ticks = int(axes.bbox.width / 75)
    axes.xaxis.set_major_formatter(COMPACT)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=num_ticks, steps=ROUND_STEPS, integer=True))
    axes.set_xlim(0, run.training[-1]["step"])
    axes.set_xlabel("step")
    for kind in MARKED_EVENTS:
        for step in sorted({row["step"] for row in run.events if row["event"] == kind}):
            axes.axvline(
                step,
                color=PALETTE["event"],
                linewidth=1.0,
                linestyle=(0, (3, 3)),
                gid=f"{kind.replace(' ', '-')}-{step}",
            )
    saved = sorted({row["step"] for row in run.events if row["event"] == "saved"})
    style: dict[str, Any] = {
        "linestyle": "none",
        "marker": "|",
        "markersize": 6,
        "color": PALETTE["event"],
        "clip_on": False,
    }
    axes.plot(saved, np.zeros(len(saved)), transform=axes.get_xaxis_transform(), gid="saved", **style)
