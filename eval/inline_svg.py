"""Matplotlib drawings as SVG elements that belong to the page they stand in.

The drawing is done in the placeholder colours of `PALETTE`, which become CSS variables: one drawing serves the light
and the dark page. Text stays text, in the page's own font.
"""

import html
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

PALETTE = {
    "ink": "#000101",
    "muted": "#000102",
    "line": "#000103",
    "training": "#000104",
    "validation": "#000105",
    "event": "#000106",
}
"""CSS variable -> the placeholder it replaces."""

RUN_COLORS = {f"run-{number}": f"#0002{number:02x}" for number in range(8)}
"""The same for the lines of several runs."""

NARROW, WIDE = (400, 236), (1040, 330)
"""Sizes in CSS pixels at scale one: a phone or half a laptop page, and a whole one."""

FONT_SIZE = {NARROW: 10.5, WIDE: 13.0}  # the narrow one is stretched by a quarter on a laptop

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rondo",  # equal runs give equal files
    "text.color": PALETTE["ink"],
    "axes.edgecolor": PALETTE["line"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": PALETTE["line"],
    "grid.linewidth": 0.8,
    "xtick.color": PALETTE["line"],
    "xtick.labelcolor": PALETTE["muted"],
    "ytick.left": False,
    "ytick.labelcolor": PALETTE["muted"],
    "lines.linewidth": 1.6,
    "lines.solid_joinstyle": "round",
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "path.simplify": False,  # which points are left out is for the caller to say
}


def render_svg(draw: Callable[[Axes], None], name: str, title: str, size: tuple[int, int]) -> str:
    """What `draw` puts on a pair of axes, as an `<svg>` element that scales with its container.

    Args:
        name: unique in the page; every id inside begins with it.
        title: what a screen reader says.
        size: NARROW or WIDE.
    """
    with matplotlib.rc_context(STYLE | {"font.size": FONT_SIZE[size]}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)
        draw(axes)
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _as_element(buffer.getvalue().decode(), name, title)


def _as_element(file: str, name: str, title: str) -> str:
    svg = file[file.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    svg = f'{opening} role="img" aria-label="{html.escape(title)}">{rest}'
    svg = svg.replace(' id="', f' id="{name}-').replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for variable, placeholder in (PALETTE | RUN_COLORS).items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    return svg
