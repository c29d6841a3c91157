"""How the curves of a run are drawn, and the loss as PNG."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mosaic_dist.figure import publish, pyplot

EMA_HALF_LIFE_SHARE = 0.02
"""Half-life of the smoothed curve, as a share of the steps shown."""


class Ink(NamedTuple):
    """Colours of a run: of what was measured, of its moving average, and of single points."""

    raw: Any
    smoothed: Any
    points: Any


RUN_INK = Ink("#9ab6d4", "#1f4e79", "#c0504d")
"""Of a run by itself."""


def smooth(values: Sequence[float], half_life: float, spans: Iterable[float] = itertools.repeat(1.0)) -> list[float]:
    """Exponential moving average without the bias of its start; NaN and infinite values are passed over.

    The half-life is in units of `spans`: what each value is the mean over.
    """
    total, weight, out = 0.0, 0.0, []
    for value, span in zip(values, spans, strict=False):
        if math.isfinite(value):
            keep = 0.5 ** (span / max(half_life, 1e-9))
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight if weight else math.nan)
    return out


def draw_curve(axes: Any, xs: Sequence[float], values: Sequence[float], ink: Ink, label: str) -> None:
    """A figure of each record over `xs`: as it was, thin, and its exponential moving average, thick."""
    marker = "." if len(xs) == 1 else ""  # one point makes no line
    axes.plot(xs, values, color=ink.raw, linewidth=0.8, marker=marker, label=label)
    half_life = max(2.0, EMA_HALF_LIFE_SHARE * len(values))
    axes.plot(xs, smooth(values, half_life), color=ink.smoothed, linewidth=1.8, label=f"{label}, EMA")


def draw_points(axes: Any, points: Sequence[tuple[float, float]], ink: Ink, label: str, marker: str = "o") -> None:
    """Figures that were measured now and then."""
    xs, values = zip(*points, strict=True)
    axes.plot(xs, values, marker, color=ink.points, markersize=5, markeredgecolor="white", label=label)


def draw_loss(axes: Any, xs: Sequence[float], records: Sequence[dict[str, Any]], ink: Ink) -> None:
    """The training loss over `xs`, raw and smoothed, as points what was measured on held-out data, and its spikes."""
    draw_curve(axes, xs, [record["loss"] for record in records], ink, "loss")
    if validated := measured(xs, records, "validation_loss"):
        draw_points(axes, validated, ink, "validation")
    if spikes := spikes_of(xs, records):
        draw_points(axes, spikes, ink, "spikes, not learnt from", "D")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.grid(alpha=0.3)


def spikes_of(xs: Sequence[float], records: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(x, loss) of each spike: where it was skipped, or where the run went back to for it."""
    skipped = [(x, record["loss"]) for x, record in zip(xs, records, strict=True) if "spike_threshold" in record]
    returns = measured(xs, records, "rewinds")
    return skipped + [(x, rewind["loss"]) for x, rewinds in returns for rewind in rewinds]


def plot_loss(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the loss over steps, and the share of held-out questions that were answered to the letter."""
    steps = [record["step"] for record in records]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    draw_loss(axes, steps, records, RUN_INK)
    if answered := measured(steps, records, "validation_exact_match"):
        right = axes.twinx()
        right.plot(*zip(*answered, strict=True), "s--", color="#4f8a3d", markersize=4)
        right.set_ylabel("validation exact match", color="#4f8a3d")
        right.set_ylim(-0.02, 1.02)
    axes.set(xlabel="step", title=title)
    axes.legend()
    publish(figure, path)


def measured(xs: Sequence[float], records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, Any]]:
    """(x, value) of the records that have a figure."""
    return [(x, record[key]) for x, record in zip(xs, records, strict=True) if key in record]
