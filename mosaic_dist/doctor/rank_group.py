"""The ranks that are examined together."""

import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch.distributed as dist

from mosaic_dist.parallel import World

T = TypeVar("T")
SHOWN = 4


class RankGroup:
    """All ranks and their hosts. Every rank makes one, and calls what says so."""

    def __init__(self, world: World):
        self.world = world
        self.hosts = self.gather(socket.gethostname())

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order of ranks. Every rank must call."""
        told: list[T] = [value] * self.world.size
        dist.all_gather_object(told, value)
        return told

    def name(self, rank: int) -> str:
        """A rank, for people."""
        return f"rank {rank} on {self.hosts[rank]}"

    def names(self, ranks: Iterable[int]) -> str:
        """Some ranks, for people."""
        found = [self.name(rank) for rank in ranks]
        return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def unlike(values: Sequence[T]) -> tuple[T, list[int]]:
    """The value that most ranks have, and the ranks that have another."""
    usual = Counter(values).most_common(1)[0][0]
    return usual, [rank for rank, value in enumerate(values) if value != usual]
