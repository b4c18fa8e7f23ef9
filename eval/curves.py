"""What the drawings of one run and of several share: columns of rows, running medians, round ticks."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from eval.quantity import compact
from eval.run_record import Row

Values = NDArray[np.float64]

ROUND_STEPS = [1, 2, 2.5, 5, 10]

MEDIAN_ROWS = 100
"""Logged steps from which on a running median is drawn over them."""

RAW_POINTS, MEDIAN_POINTS = 1500, 300
"""Points of a thin and of a thick line, however long the run."""

COMPACT = FuncFormatter(lambda value, _: compact(value))


def log_ticks(axes: Axes, which: str, values: Sequence[float] | Values) -> None:
    """Up to eight round numbers on a logarithmic axis, also where it covers less than a decade."""
    finite = [value for value in values if math.isfinite(value) and value > 0]
    low, high = (min(finite), max(finite)) if finite else (0.1, 1.0)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        ticks = [m * 10.0**d for d in decades for m in mantissas if 0.97 * low <= m * 10.0**d <= 1.03 * high]
        if len(ticks) >= 5:
            break
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(COMPACT)
    if len(ticks) < 3:
        ticks = [float(tick) for tick in MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high)]
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_major_locator(FixedLocator(ticks[:: max(1, math.ceil(len(ticks) / 8))]))
    axis.set_minor_locator(NullLocator())


def linear_ticks(axes: Axes) -> None:
    """Up to seven round numbers up a linear axis."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND_STEPS))
    axes.yaxis.set_major_formatter(COMPACT)


def column(rows: Sequence[Row], key: str) -> Values:
    """One key of all rows; NaN where a row lacks it."""
    return np.array([row[key] if row.get(key) is not None else np.nan for row in rows], dtype=np.float64)


def spread(count: int, points: int, *, log: bool = False) -> NDArray[np.int64]:
    """Up to `points` of the indices below `count`, the first and the last included, evenly spaced on their axis."""
    spaced = np.geomspace(1, count, points) - 1 if log else np.linspace(0, count - 1, points)
    return np.unique(spaced.round().astype(np.int64))


def medians(values: Values, centres: NDArray[np.int64], reach: int) -> Values:
    """Median of the finite values up to `reach` away from each centre, and less at the start, where curves fall."""
    medians = np.full(len(centres), np.nan)
    for i, centre in enumerate(centres):
        near = min(reach, centre // 8)
        window = values[centre - near : centre + near + 1]
        if np.isfinite(window).any():
            medians[i] = np.median(window[np.isfinite(window)])
    return medians


def extremes(values: Values, points: int, *, log: bool = False) -> NDArray[np.int64]:
    """Indices of up to `points` values: of each group of neighbours the lowest and the highest, so no spike is lost."""
    if len(values) <= points:
        return np.arange(len(values))
    groups = np.split(np.arange(len(values)), spread(len(values), points // 2, log=log)[1:-1])
    low, high = np.where(np.isfinite(values), values, np.inf), np.where(np.isfinite(values), values, -np.inf)
    return np.unique([index for g in groups for index in (g[np.argmin(low[g])], g[np.argmax(high[g])])])
