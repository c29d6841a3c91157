"""Figures as PNG files, drawn without a screen."""

import io
from pathlib import Path
from typing import Any

import matplotlib

from mosaic_dist.files import check_output_file, write_atomic

matplotlib.use("Agg")
from matplotlib import pyplot

__all__ = ["publish", "pyplot"]


def publish(figure: Any, path: Path) -> None:
    """Write a figure as PNG, so that a reader sees the old one or the new one, and let it go."""
    check_output_file(path)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, picture.getvalue())
