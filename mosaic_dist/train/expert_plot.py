"""What the experts do, as PNG: figures of each layer over the steps, and a heat map of the choices."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib import cm, colors, ticker

from mosaic_dist.figure import publish, pyplot
from mosaic_dist.train.experts import Experts

HEAT_RECORDS = 20
"""The heat map is over so many of the last records: one step is noise, the whole run hides what is now."""
CURVE_POINTS = 400
"""Of a longer history means are drawn: the noise of one layer would hide the layers behind it."""
NAMED_LAYERS = 8
"""With more layers than that a scale of colours stands for the list of their names."""
LABELLED_ROWS = 40
"""With more rows than that some of the heat map go without their name."""
SHARES = (1 / 4, 1 / 2, 1, 2, 4)
"""Marks of the heat map's scale, whose ends are the first and the last."""


def _entropy_share(figures: dict[str, Any]) -> float:
    """Entropy as a share of its greatest value, ln E; NaN for a layer with a single expert."""
    experts = len(figures["load"])
    return figures["entropy"] / math.log(experts) if experts > 1 else math.nan


PANELS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "busiest expert / even share": lambda figures: figures["max_over_mean"],
    "router entropy / ln E": _entropy_share,
    "share of dead experts": lambda figures: figures["dead"],
    "share of dropped choices": lambda figures: figures["drop_rate"],
    "balance loss, unweighted": lambda figures: figures["balance"],
    "z-loss, unweighted": lambda figures: figures["z"],
    "expert bias, lowest and highest": lambda figures: figures.get("expert_bias", (math.nan, math.nan)),
}
"""What is drawn over the steps, from the figures of a layer."""


class ExpertHistory:
    """What a run's metrics tell of its experts. Of the loads, which are the bulk, only the last are kept."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.panels: dict[str, dict[str, list[Any]]] = {panel: {} for panel in PANELS}
        """Values at `steps`, by panel and layer."""
        self.loads: deque[dict[str, list[int]]] = deque(maxlen=HEAT_RECORDS)

    def add(self, step: int, experts: Experts) -> None:
        """Take the figures of a record; `{}` where it has none."""
        if not experts:
            return
        self.steps.append(step)
        for panel, value in PANELS.items():
            for layer, figures in experts.items():
                self.panels[panel].setdefault(layer, []).append(value(figures))
        self.loads.append({layer: figures["load"] for layer, figures in experts.items()})


def split_experts(records: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], ExpertHistory]:
    """The records of a run without their `experts`, and the history that these make."""
    rest, history = [], ExpertHistory()
    for record in records:
        history.add(record["step"], record.pop("experts", {}))
        rest.append(record)
    return rest, history


def relative_shares(loads: "deque[dict[str, list[int]]]") -> dict[str, numpy.ndarray]:
    """Choices per expert of each layer over all records, relative to an even share, [E]; 1 for all is balance."""
    sums = {layer: numpy.sum([record[layer] for record in loads], axis=0) for layer in loads[-1]}
    return {layer: load_E * len(load_E) / load_E.sum() for layer, load_E in sums.items()}


def condense(values: Sequence[Any]) -> numpy.ndarray:
    """Means over neighbours, so that at most CURVE_POINTS are left; of numbers [n], or of pairs [n, 2]."""
    parts = numpy.array_split(numpy.asarray(values, dtype=float), min(len(values), CURVE_POINTS))
    return numpy.array([part.mean(axis=0) for part in parts])


def plot_experts(history: ExpertHistory, path: Path, title: str) -> None:
    """Draw the figures of each layer over the steps, above the heat map of the last records."""
    shares = relative_shares(history.loads)
    heat_inches = min(9.0, max(2.2, 0.8 + 0.17 * len(shares)))
    figure = pyplot.figure(figsize=(13, 5.6 + heat_inches), layout="constrained")
    figure.suptitle(title)
    upper, lower = figure.subfigures(2, 1, height_ratios=(5.6, heat_inches))
    _draw_panels(upper, history)
    records, first = len(history.loads), history.steps[-len(history.loads)]
    _draw_heat(
        lower,
        shares,
        f"choices of an expert / even share, over the last {records} logged records with experts "
        f"(steps {first} to {history.steps[-1]}); black: never chosen",
    )
    publish(figure, path)


def _draw_panels(figure: Any, history: ExpertHistory) -> None:
    """A small plot for each panel that has values, a line in it for each layer, and what the colours mean."""
    grid = figure.subplots(2, 4).flat
    layers = list(history.panels[next(iter(PANELS))])
    scale: Any = cm.ScalarMappable(colors.Normalize(0, max(1, len(layers) - 1)), "viridis")
    steps, marker = condense(history.steps), "." if len(history.steps) == 1 else ""  # one point makes no line
    for name, lines in history.panels.items():
        if all(numpy.isnan(values).all() for values in lines.values()):
            continue
        axes = next(grid)
        for i, values in enumerate(lines.values()):
            axes.plot(steps, condense(values), color=scale.to_rgba(i), linewidth=0.9, marker=marker)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("step", fontsize="small")
        axes.grid(alpha=0.3)
        axes.ticklabel_format(useOffset=False)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.tick_params(labelsize="small")
        if name.startswith("share"):
            top = max(0.01, axes.get_ylim()[1])
            axes.set_ylim(-0.03 * top, top)  # zero is what one hopes for, and is to be seen
    free = list(grid)
    for axes in free:
        axes.set_axis_off()
    _explain_colours(figure, free[0], scale, layers)


def _explain_colours(figure: Any, axes: Any, scale: Any, layers: list[str]) -> None:
    """Names of the layers, or a scale of colours where they are many."""
    if len(layers) <= NAMED_LAYERS:
        for i, layer in enumerate(layers):
            axes.plot([], [], color=scale.to_rgba(i), label=layer)
        axes.legend(loc="center", frameon=False)
        return
    bar = figure.colorbar(scale, cax=axes.inset_axes((0.2, 0.0, 0.08, 1.0)))
    marked = sorted({0, len(layers) // 2, len(layers) - 1})
    bar.set_ticks(marked, labels=[layers[i] for i in marked])


def _draw_heat(figure: Any, shares: dict[str, numpy.ndarray], title: str) -> None:
    """A row for each layer, a cell for each expert, on a logarithmic scale with an even share in its middle."""
    width = max(map(len, shares.values()))
    share_LE = numpy.array(
        [numpy.pad(share, (0, width - len(share)), constant_values=math.nan) for share in shares.values()]
    )
    axes = figure.subplots()
    axes.set_facecolor("#d9d9d9")  # to the right of the layers that have fewer experts
    picture = axes.imshow(
        share_LE, cmap="RdBu_r", norm=colors.LogNorm(SHARES[0], SHARES[-1]), aspect="auto", interpolation="nearest"
    )
    never_LE = numpy.where(share_LE == 0, 0.0, math.nan)
    axes.imshow(never_LE, cmap=colors.ListedColormap(["black"]), aspect="auto", interpolation="nearest")
    every = math.ceil(len(shares) / LABELLED_ROWS)
    axes.set_yticks(range(0, len(shares), every), labels=list(shares)[::every], fontsize="small")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(16, integer=True))
    axes.set_xlabel("expert")
    axes.set_title(title, fontsize="medium")
    bar = figure.colorbar(picture, ax=axes, extend="both", ticks=SHARES, fraction=0.03, pad=0.01)
    bar.ax.set_yticklabels([f"{share:g}" for share in SHARES])
    bar.ax.minorticks_off()
