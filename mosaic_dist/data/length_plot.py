"""A histogram of the documents' lengths as PNG."""

from pathlib import Path

import numpy as np
from matplotlib import ticker

from mosaic_dist.data.lengths import Lengths
from mosaic_dist.errors import UserError
from mosaic_dist.figure import publish, pyplot

BINS = 50


def bin_edges(shortest: int, longest: int) -> np.ndarray:
    """Edges of at most BINS bins that grow by about the same factor, each of them at least one length wide."""
    return np.unique(np.geomspace(shortest, longest + 1, BINS + 1).round().astype(np.int64))


def plot_lengths(lengths: Lengths, path: Path, title: str, seq_len: int) -> None:
    """Draw documents by length, on a logarithmic scale, and the share of all tokens in documents up to each length."""
    values, counts = lengths.sorted()
    if not len(values):
        raise UserError(f"no document ends in this split, so there are no lengths to draw into {path}")
    edges = bin_edges(int(values[0]), int(values[-1]))
    documents, _ = np.histogram(values, edges, weights=counts)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    # a bin holds whole numbers: its bar goes from half a token before the first to half a token behind the last
    axes.stairs(documents, edges - 0.5, fill=True, color="#9ab6d4", label="documents")
    axes.axvline(lengths.quantile(0.5), color="#1f4e79", linewidth=1.4, label=f"median, {lengths.quantile(0.5):,}")
    axes.axvline(seq_len, color="#c0504d", linewidth=1.4, linestyle="--", label=f"seq_len, {seq_len:,}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_count))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(_count))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    if values[-1] < 10 * values[0]:  # less than a decade, so its marks alone would leave the axis bare
        axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set(xlabel="tokens of a document, EOS included", ylabel="documents", title=title)
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot(values, (values * counts).cumsum() / (values * counts).sum(), color="#4f8a3d", linewidth=1.4)
    right.set_ylabel("share of all tokens, documents up to here", color="#4f8a3d")
    right.set_ylim(0, 1.02)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    publish(figure, path)


def _count(value: float, _: int) -> str:
    return f"{value:,.0f}"
