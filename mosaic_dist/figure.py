"""Figures as PNG files, drawn without a screen."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

__all__ = ["publish", "pyplot"]


def publish(figure: Any, path: Path) -> None:
    """Write a figure as PNG, so that a reader sees the old one or the new one, and let it go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=120, format="png")
    aside.replace(path)
    pyplot.close(figure)
