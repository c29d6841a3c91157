"""How long the documents of a dataset are, in tokens."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.shards import Shards

CHUNK_TOKENS = 1 << 22  # that are read at a time


class Lengths:
    """Documents by their length. `open_tokens` are those behind the last end: a document that goes on elsewhere."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.open_tokens = 0

    def add_stream(self, tokens_S: np.ndarray, eos_id: int) -> None:
        """Take the next tokens of packed documents. An EOS is the last token of its document and counts."""
        ends = np.flatnonzero(tokens_S == eos_id)
        if not len(ends):
            self.open_tokens += len(tokens_S)
            return
        lengths = np.diff(ends, prepend=-1)
        lengths[0] += self.open_tokens
        self.add(lengths)
        self.open_tokens = len(tokens_S) - int(ends[-1]) - 1

    def add(self, lengths: np.ndarray) -> None:
        """Take documents of these lengths."""
        values, times = np.unique(lengths, return_counts=True)
        for value, count in zip(values.tolist(), times.tolist(), strict=True):
            self.counts[value] += count

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """The lengths that there are, ascending, and the documents of each."""
        values = np.array(sorted(self.counts), np.int64)
        return values, np.array([self.counts[value] for value in values.tolist()], np.int64)

    def quantile(self, share: float) -> int:
        """The smallest length that at least this share of the documents does not exceed."""
        values, counts = self.sorted()
        return int(values[np.searchsorted(counts.cumsum(), share * counts.sum())])

    def describe(self) -> dict[str, float]:
        """Figures for people and programs; without any whole document, the count alone."""
        values, counts = self.sorted()
        if not len(values):
            return {"documents": 0, "open_tokens": self.open_tokens}
        return {
            "documents": int(counts.sum()),
            "shortest": int(values[0]),
            "median": self.quantile(0.5),
            "mean": float((values * counts).sum() / counts.sum()),
            "p90": self.quantile(0.9),
            "p99": self.quantile(0.99),
            "longest": int(values[-1]),
            "open_tokens": self.open_tokens,
        }


def measure_lengths(info: DatasetInfo, split: str) -> Lengths:
    """Lengths of all documents of a split, from EOS to EOS in the order of its samples, with a progress bar.

    Where each row is a document of its own, padding does not count. Memory is bounded by CHUNK_TOKENS and by how many
    different lengths there are. Shards are checked as they are in training; UserError for a broken one.
    """
    shards, lengths = Shards(info, split), Lengths()
    for tokens_BT in _chunks(shards, split):
        if info.answer_loss is not None:
            lengths.add((tokens_BT != info.answer_loss.pad_id).sum(axis=1))
        else:
            lengths.add_stream(tokens_BT[:, :-1].ravel(), info.eos_id)
    if info.answer_loss is None:
        lengths.add_stream(tokens_BT[-1, -1:], info.eos_id)  # samples share a token with the next, and this has none
    return lengths


def _chunks(shards: Shards, split: str) -> Iterator[np.ndarray]:
    rows = max(1, CHUNK_TOKENS // (shards.seq_len + 1))
    with tqdm(total=len(shards), unit=" samples", unit_scale=True, desc=f"reading {split}", disable=None) as bar:
        for start in range(0, len(shards), rows):
            samples = np.arange(start, min(start + rows, len(shards)))
            yield shards.read(samples)
            bar.update(len(samples))
