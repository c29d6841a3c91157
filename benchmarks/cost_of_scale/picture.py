"""Points for what was measured, dashed lines for the order that it should have: a column of panels for each axis."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import ticker

from benchmarks.cost_of_scale.axes import Axis, Cost
from benchmarks.cost_of_scale.exponent import upper_half
from mosaic_dist.figure import publish, pyplot

INKS = ("#1f4e79", "#c0504d", "#4f8a3d")
GREY = "#555555"
MIB = 1 << 20


class Series(NamedTuple):
    """One of the figures of `Cost`, and how it is drawn."""

    figure: str
    label: str
    marker: str
    unit: float = 1.0


ROWS = (
    ("seconds", (Series("seconds", "forward and backward", "o"), Series("update_seconds", "update", "^"))),
    (
        "MiB",
        (Series("peak_bytes", "peak of all tensors", "o", MIB), Series("kept_bytes", "kept for backward", "^", MIB)),
    ),
)


def draw_costs(found: dict[str, dict[int, Cost]], axes: Sequence[Axis], path: Path) -> None:
    """Draw as PNG; `found` has the costs of each axis by its name, by size."""
    panels = list(dict.fromkeys(axis.panel for axis in axes))
    shape = {"squeeze": False, "sharex": "col", "sharey": "row"}
    figure, cells = pyplot.subplots(2, len(panels), figsize=(3.1 * len(panels) + 1, 6.6), layout="constrained", **shape)
    for column, panel in enumerate(panels):
        shown = [axis for axis in axes if axis.panel == panel]
        for row, (unit, series) in enumerate(ROWS):
            _draw_panel(cells[row][column], {axis: found[axis.name] for axis in shown}, series)
            if column == 0:
                cells[row][0].set_ylabel(unit)
                _explain(cells[row][0], series)
        cells[1][column].set_xlabel(panel)
        if len(shown) > 1:
            _name(cells[0][column], shown)
    publish(figure, path)


def _draw_panel(panel: Any, lines: dict[Axis, dict[int, Cost]], series: Sequence[Series]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.grid(alpha=0.3)
    panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, place: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
    for (axis, costs), ink in zip(lines.items(), INKS, strict=False):
        sizes = list(costs)
        for figure, _, marker, unit in series:
            values = [getattr(cost, figure) / unit for cost in costs.values()]
            fill = ink if marker == "o" else "white"
            panel.plot(sizes, values, marker, color=ink, markerfacecolor=fill, markersize=4.5)
            fitted, order = upper_half(sizes), getattr(axis.expected, figure)
            start = upper_half(values)[0]
            line = [start * (size / fitted[0]) ** order for size in fitted]
            panel.plot(fitted, line, "--", color=ink, linewidth=1.0)


def _explain(panel: Any, series: Sequence[Series]) -> None:
    """A legend of the markers and of the dashes."""
    for _, label, marker, _ in series:
        fill = GREY if marker == "o" else "white"
        panel.plot([], [], marker, color=GREY, markerfacecolor=fill, label=label)
    panel.plot([], [], "--", color=GREY, linewidth=1.0, label="expected order")
    panel.legend(fontsize="x-small")


def _name(panel: Any, shown: Sequence[Axis]) -> None:
    """A legend of the axes that share a panel."""
    for axis, ink in zip(shown, INKS, strict=False):
        panel.plot([], [], "o", color=ink, label=axis.name.rpartition(", ")[2])
    panel.legend(fontsize="x-small")
