"""The house style of every figure: colours, fonts, and how a figure is made and saved.

Knows nothing about what is drawn. Uses matplotlib's object interface only: no pyplot, no display, no state left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#1f2933", "#64707d", "#e4e8ec"
COMPUTE, TRANSFER, WAIT = "#4a7ba6", "#e2a33c", "#c94f3d"
QUIET = "#a9b6c2"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "svg.hashsalt": "pregate",  # the same figures give the same bytes
}
WIDTH_INCHES = 9.2


def write_figure(path: Path, draw: Callable[[Figure], None], height_inches: float) -> bool:
    """Let `draw` fill a figure in the house style and save it, as PNG or SVG by the suffix of `path`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        draw(figure)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


def lines_across(axes: Axes) -> None:
    """Horizontal grid lines in place of the line of the y axis."""
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)


def percent_axis(axes: Axes) -> None:
    """A y axis that is marked from 0 to 100 %."""
    axes.set_yticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)], color=FAINT)
