"""Several datasets read as one: what they must have in common, and whose turn it is at each position."""

import dataclasses
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_dist.data.answer import AnswerLoss
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.order import Order
from mosaic_dist.errors import UserError

ROUND_LIMIT = 1 << 16
"""Proportions that do not come out even within so many positions are rounded to parts of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """One stream of a mixture: a split of a dataset, and its weight beside the others."""

    name: str
    info: DatasetInfo
    split: str
    proportion: float


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Datasets that are trained on together. Made by `mix`, which checks that they fit each other."""

    parts: tuple[MixtureSource, ...]

    @property
    def path(self) -> str:
        """Where the streams lie, for messages."""
        return ", ".join(str(part.info.path) for part in self.parts)

    @property
    def seq_len(self) -> int:
        """Of each dataset."""
        return self.parts[0].info.seq_len

    @property
    def vocab_size(self) -> int:
        """Of each dataset."""
        return self.parts[0].info.vocab_size

    @property
    def tokenizer(self) -> str:
        """Digest of the one tokenizer."""
        return self.parts[0].info.tokenizer

    @property
    def tokenizer_path(self) -> Path:
        """A copy of the one tokenizer."""
        return self.parts[0].info.tokenizer_path

    @property
    def eos_id(self) -> int:
        """Of each dataset."""
        return self.parts[0].info.eos_id

    @property
    def answer_loss(self) -> AnswerLoss | None:
        """Of each dataset."""
        return self.parts[0].info.answer_loss


Corpus = DatasetInfo | Mixture
"""What a run is trained on."""


def mix(parts: Sequence[MixtureSource]) -> Mixture:
    """The parts as one. UserError that names two of them for a property in which they differ."""
    first = parts[0].info
    for other in (part.info for part in parts[1:]):
        for field in ("tokenizer", "vocab_size", "eos_id", "bos_id", "seq_len", "answer_loss"):
            here, there = getattr(first, field), getattr(other, field)
            if here != there:
                raise UserError(
                    f"{first.path} and {other.path} cannot be mixed: their {field} are {here} and {there}; prepare one "
                    "of them again with the other's"
                )
    return Mixture(tuple(parts))


def parts_of(corpus: Corpus, split: str) -> tuple[MixtureSource, ...]:
    """The streams of a corpus; a dataset by itself is one without a name, of which `split` is read."""
    if isinstance(corpus, Mixture):
        return corpus.parts
    return (MixtureSource(name="", info=corpus, split=split, proportion=1.0),)


def shares(proportions: Sequence[float]) -> list[int]:
    """Positions of each stream in a round, as small as the proportions allow: (0.7, 0.3) are (7, 3) in 10.

    A round is at most ROUND_LIMIT long; proportions that need more, as 1/3 written as a float does, are rounded to
    parts of it, the largest remainders up.
    """
    exact = [Fraction(repr(proportion)) for proportion in proportions]  # as it was written, not as it is stored
    total = sum(exact)
    length = math.lcm(*((part / total).denominator for part in exact))
    if length <= ROUND_LIMIT:
        return [int(part / total * length) for part in exact]
    wanted = [part / total * ROUND_LIMIT for part in exact]
    if (least := min(wanted)) < 1:
        proportion = proportions[wanted.index(least)]
        raise UserError(f"proportion {proportion:g} is less than 1 part in {ROUND_LIMIT:,} of the whole; leave it out")
    rounded = [math.floor(part) for part in wanted]
    by_remainder = sorted(range(len(wanted)), key=lambda stream: rounded[stream] - wanted[stream])
    for stream in by_remainder[: ROUND_LIMIT - sum(rounded)]:
        rounded[stream] += 1
    return rounded


def interleave(counts: Sequence[int]) -> np.ndarray:
    """Whose turn it is at each position of a round: int64 [sum of counts], stream i as often as counts[i].

    In every prefix of p positions each stream had less than one turn more or less than p * its share. For that its turn
    k must come between k / share and (k + 1) / share, rounded outwards. Taking the one that is due first among those
    that may come keeps all of these times (Tijdeman, The chairman assignment problem, 1980).
    """
    length = sum(counts)
    waiting = [(0, stream, 0) for stream in range(len(counts))]  # the first position for a turn, its stream and number
    ready: list[tuple[int, int, int]] = []  # behind its last position, its stream and number
    found = np.empty(length, np.int64)
    for position in range(length):
        while waiting and waiting[0][0] <= position:
            _, stream, turn = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(turn + 1) * length // counts[stream]), stream, turn))
        due, stream, turn = heapq.heappop(ready)
        assert position < due, f"stream {stream} of {list(counts)} is late at {position}"
        found[position] = stream
        if turn + 1 < counts[stream]:
            heapq.heappush(waiting, ((turn + 1) * length // counts[stream], stream, turn + 1))
    return found


class MixedOrder:
    """The orders of several streams, each walked on for ever by itself, interleaved by their proportions.

    A pure function of (orders, proportions, position). Samples are numbered as if the streams lay one after the other.
    """

    def __init__(self, orders: Sequence[Order], proportions: Sequence[float]):
        self.orders = orders
        self.counts = np.array(shares(proportions), np.int64)
        self.turns = interleave(self.counts.tolist())
        self.starts = np.cumsum([0, *(order.samples for order in orders)])[:-1]

    def describe(self) -> dict[str, Any]:
        """What the order depends on besides the samples, for a fingerprint."""
        mixing = {"mixing_version": 1, "proportions": self.counts.tolist()} if len(self.orders) > 1 else {}
        blocks = {} if len(self.orders) == 1 else {"block_samples": [order.block_samples for order in self.orders]}
        return self.orders[0].describe() | blocks | mixing

    def taken(self, position: int) -> np.ndarray:
        """Samples of each stream before a position of the whole: int64 [streams]."""
        rounds, inside = divmod(position, len(self.turns))
        return rounds * self.counts + np.bincount(self.turns[:inside], minlength=len(self.counts))

    def take(self, position: int, count: int) -> np.ndarray:
        """Sample numbers at `position` and the `count - 1` after it."""
        streams = self.turns[np.arange(position, position + count) % len(self.turns)]
        samples, places = np.empty(count, np.int64), self.taken(position)
        for stream, order in enumerate(self.orders):
            mine = streams == stream
            samples[mine] = order.take(int(places[stream]), int(mine.sum())) + self.starts[stream]
        return samples
