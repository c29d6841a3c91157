"""Short texts that the ranks leave for each other, beside all collectives and while these hang."""

from datetime import timedelta

import torch

PATIENCE_SECONDS = 10.0
"""For the process that keeps the texts; a run that hangs may hang because it cannot be reached."""


class Board:
    """One text of each rank, in the store in which the ranks met, over a connection of its own.

    Every rank makes one, once the processes have met. One thread at a time may use it. All methods raise what torch
    raises where the store is gone or does not answer in PATIENCE_SECONDS.
    """

    def __init__(self, name: str, rank: int, size: int):
        store = torch.distributed.distributed_c10d._get_default_store().clone()
        store.set_timeout(timedelta(seconds=PATIENCE_SECONDS))
        self.store = store
        self.keys = [f"mosaic_dist/{name}/{i}" for i in range(size)]
        self.mine = self.keys[rank]

    def put(self, text: str) -> None:
        """Replace this rank's text."""
        self.store.set(self.mine, text)

    def read(self) -> list[str | None]:
        """The texts of all ranks; None of those that have left none."""
        return [self.store.get(key).decode() if self.store.check([key]) else None for key in self.keys]
