"""A bar for each launcher, made of the phases of a start."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib import colormaps

from mosaic_dist.figure import publish, pyplot

LEAST_SHARE = 0.03
"""Of the longest bar, for a phase to be told in it."""


def draw_phases(found: Mapping[str, Mapping[str, tuple[float, float]]], path: Path) -> None:
    """Draw as PNG; `found` has seconds and CPU seconds by launcher and phase."""
    bars = [
        (f"{name}\n{kind}", {phase: spent[i] for phase, spent in told.items()})
        for name, told in found.items()
        for i, kind in enumerate(("clock", "CPU"))
    ]
    names = list(dict.fromkeys(phase for _, told in bars for phase in told))
    inks = dict(zip(names, colormaps["tab20"].colors, strict=False))
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.7 * len(bars)), layout="constrained")
    longest = max(sum(told.values()) for _, told in bars)
    for row, (_, told) in enumerate(bars):
        left = 0.0
        for phase, seconds in told.items():
            axes.barh(row, seconds, left=left, color=inks[phase], edgecolor="white", linewidth=0.5)
            if seconds > LEAST_SHARE * longest:
                axes.text(left + seconds / 2, row, f"{seconds:.1f}", ha="center", va="center", fontsize="small")
            left += seconds
    for phase in names:
        axes.barh(0, 0, color=inks[phase], label=phase)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("seconds from the launch to the end of the first step")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    publish(figure, path)
