"""Loss curves as PNG."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosaic_dist.figure import publish, pyplot

EMA_HALF_LIFE_SHARE = 0.02
"""Half-life of the smoothed curve, as a share of the steps shown."""


def smooth(values: Sequence[float], half_life: float) -> list[float]:
    """Exponential moving average without the bias of its start; NaN and infinite values are passed over."""
    keep, total, weight, out = 0.5 ** (1 / max(half_life, 1e-9)), 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight if weight else math.nan)
    return out


def plot_loss(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the training loss, raw and smoothed, and what was measured on held-out data, over steps."""
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="#9ab6d4", linewidth=0.8, label="loss")
    half_life = max(2.0, EMA_HALF_LIFE_SHARE * len(steps))
    axes.plot(steps, smooth(losses, half_life), color="#1f4e79", linewidth=1.8, label="loss, EMA")
    if validated := _measured(records, "validation_loss"):
        axes.plot(*zip(*validated, strict=True), "o-", color="#c0504d", markersize=4, label="validation")
    if answered := _measured(records, "validation_exact_match"):
        right = axes.twinx()
        right.plot(*zip(*answered, strict=True), "s--", color="#4f8a3d", markersize=4)
        right.set_ylabel("validation exact match", color="#4f8a3d")
        right.set_ylim(-0.02, 1.02)
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    publish(figure, path)


def _measured(records: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records if key in record]
