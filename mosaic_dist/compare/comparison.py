"""A comparison as a Markdown table and as a picture."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from mosaic_dist.compare.curves import axis_unit, cut_start, mark_counts, run_inks
from mosaic_dist.compare.history import duration
from mosaic_dist.compare.measures import POINTS, RunComparison, Spread, Variant, spread
from mosaic_dist.figure import publish, pyplot
from mosaic_dist.train.plot import EMA_HALF_LIFE_SHARE, Ink

GRID_POINTS = 200
"""Of a mean curve."""
LEGEND_CHARACTERS, ENTRY_CHARACTERS = 170, 8
"""How many fit into a row of the legend, and what an entry takes beside its name."""
MIB = 1 << 20


def render(comparison: RunComparison, left_out: Sequence[str] = ()) -> str:
    """The table, the lowest loss first, and what its figures are."""
    points = comparison.points
    final = "validation loss" if comparison.is_validated else "training loss"
    where = f"{points['tokens']:,.0f} tokens", f"{points['flops']:.3g} FLOPs", duration(points["time"])
    heads = ["variant", "seeds", final, *(f"at {point}" for point in where)]
    heads.insert(4, f"against {comparison.baseline.name}")
    heads += ["tokens/s", "parameters", "active", "peak MiB"]
    rows = [_cells(comparison, variant) for variant in by_loss(comparison)]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *notes(comparison), *left_out]) + "\n"


def by_loss(comparison: RunComparison) -> list[Variant]:
    """The variants, the lowest final loss first; those without one at the end."""
    return sorted(comparison.variants, key=lambda v: (numpy.isnan(mean := comparison.final(v).mean), mean))


def _cells(comparison: RunComparison, variant: Variant) -> list[str]:
    stories, first = variant.stories, variant.stories[0]
    speeds = [statistics.median(told) for story in stories if (told := story.told("tokens_per_second"))]
    peaks = [max(told) for story in stories if (told := story.told("memory_bytes"))]
    at_tokens, *at_others = (shown(comparison.loss_at(variant, axis)) for axis in POINTS)
    return [
        variant.name,
        str(len(stories)),
        shown(comparison.final(variant)),
        at_tokens,
        "" if variant is comparison.baseline else _signed(comparison.against_baseline(variant)),
        *at_others,
        shown(spread(speeds), 0) if speeds else "",
        f"{first.parameters:,}",
        f"{first.active_parameters:,}",
        f"{max(peaks) / MIB:,.0f}" if peaks else "",
    ]


def _signed(difference: Spread | None) -> str:
    return "" if difference is None else ("+" if difference.mean >= 0 else "") + shown(difference)


def notes(comparison: RunComparison) -> list[str]:
    """What a reader has to know of the table."""
    final = (
        "The validation loss is the last one of each run."
        if comparison.is_validated
        else "Not all runs have a validation loss, so the training loss is compared, averaged as below."
    )
    unfinished = [
        f"{story.run.name} ({story.records[-1]['step']:,} of {story.run.steps:,} steps)"
        for variant in comparison.variants
        for story in variant.stories
        if story.records[-1]["step"] < story.run.steps
    ]
    return [
        f"{final} Behind ± is the standard deviation over seeds (n - 1).",
        "Losses at equal tokens, at equal FLOPs (of the model, forward and backward) and at equal time (of training "
        "steps, without validation and saves) are training losses. Each of these points is the largest that every run "
        "has got to. They are read off the exponential moving average, between records on a straight line; its "
        f"half-life is {EMA_HALF_LIFE_SHARE:.0%} of the equal tokens, and two records at least.",
        f"Against {comparison.baseline.name}: the loss at equal tokens minus that of the same seed, which has read the "
        "same batches; mean and deviation of these differences.",
        "Tokens/s are medians over the steps; memory is that of each run's main process.",
        *([f"Not at their last step: {', '.join(unfinished)}."] if unfinished else []),
    ]


def shown(figure: Spread, digits: int = 4) -> str:
    """A mean and its spread."""
    mean = f"{figure.mean:,.{digits}f}"
    return mean if figure.deviation is None else f"{mean} ± {figure.deviation:,.{digits}f}"


def draw_comparison(comparison: RunComparison, path: Path) -> None:
    """Draw the averaged losses over tokens, FLOPs and time, and the final ones, as PNG; a colour for each variant."""
    figure = pyplot.figure(figsize=(13, 9), layout="constrained")
    grid = list(figure.subplots(2, 2).flat)
    ordered = by_loss(comparison)
    inks = dict(zip((variant.name for variant in comparison.variants), run_inks(len(ordered)), strict=True))
    for axes, axis in zip(grid, POINTS, strict=False):
        unit, name = axis_unit(axis, max(s.along(axis)[-1] for variant in ordered for s in variant.stories))
        for variant in ordered:
            _draw_band(axes, comparison, variant, axis, unit, inks[variant.name])
        axes.set(xlabel=name, ylabel="training loss, EMA (nats per token)")
        mark_counts(axes.xaxis)
        cut_start(axes, (line.get_ydata() for line in axes.get_lines()))
        axes.axvline(comparison.points[axis] / unit, color="#555555", linestyle=":", linewidth=1.2)
        axes.grid(alpha=0.3)
    _draw_final(grid[-1], comparison, ordered, inks)
    columns = LEGEND_CHARACTERS // (ENTRY_CHARACTERS + max(len(variant.name) for variant in ordered))
    handles = grid[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(5, max(1, columns)), frameon=False)
    figure.suptitle("mean over seeds, and between which values they lie; dotted: where losses are compared")
    publish(figure, path)


def _draw_band(axes: Any, comparison: RunComparison, variant: Variant, axis: Any, unit: float, ink: Ink) -> None:
    """The mean curve of a variant's runs as far as all of them go, and the range of these."""
    curves = [comparison.curve(story, axis) for story in variant.stories]
    first, last = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    xs = numpy.linspace(first, last, GRID_POINTS)
    losses = numpy.array([numpy.interp(xs, *curve) for curve in curves])
    axes.plot(xs / unit, losses.mean(0), color=ink.smoothed, linewidth=1.6, label=variant.name)
    axes.fill_between(xs / unit, losses.min(0), losses.max(0), color=ink.raw, linewidth=0)


def _draw_final(axes: Any, comparison: RunComparison, ordered: Sequence[Variant], inks: dict[str, Ink]) -> None:
    """The final losses, the lowest above: each seed, and the mean."""
    for place, variant in enumerate(ordered):
        finals = [comparison.final(Variant(variant.name, [story])).mean for story in variant.stories]
        colour = inks[variant.name].smoothed
        axes.plot(finals, [place] * len(finals), "o", color=colour, markersize=5, alpha=0.6)
        axes.plot([comparison.final(variant).mean], [place], "|", color=colour, markersize=22, markeredgewidth=2.5)
    axes.set_yticks(range(len(ordered)), labels=[variant.name for variant in ordered])
    axes.invert_yaxis()
    axes.margins(y=0.15)
    what = "last validation loss" if comparison.is_validated else "training loss at the end, EMA"
    axes.set(xlabel=f"{what} (nats per token): each seed, and the mean")
    axes.grid(alpha=0.3)
