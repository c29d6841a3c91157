"""Batches for training and validation, with one global cursor as the whole state.

A step with a global batch of G samples takes positions cursor ... cursor + G of the order (`order.py`, `mixture.py`),
and rank r of W the r-th of W equal parts of them. G may depend on the cursor, as it does in a batch ramp. The order
knows neither ranks nor workers, so a run continues with the same samples in every step on another number of either, and
nothing is dropped where epochs meet. Shards are read map-style; see `mds.py` for why not through StreamingDataset.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch

from mosaic_dist.data.batch import FILLER, Batch, DeviceCopy, make_batch
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.encode import VALIDATION
from mosaic_dist.data.mixture import Corpus, MixedOrder, parts_of
from mosaic_dist.data.order import Order
from mosaic_dist.data.prefetch import prefetch, read_rows
from mosaic_dist.data.settings import Data
from mosaic_dist.data.shards import Joined, Samples, Shards
from mosaic_dist.errors import UserError


class Loader:
    """Training batches of one rank, for ever. Iterating starts at the cursor.

    `rank` and `world_size` count the ranks that read different data: ranks that share sequences count as one.
    `state()` is plain JSON and counts only samples whose batch was handed out; `Loader(..., state=...)` goes on there.
    `global_batch` and `world_size` may have changed in between; a changed dataset, seed, order or sequence length
    raises UserError, because samples would be repeated or lost in silence.
    """

    def __init__(
        self,
        data: Data,
        corpus: Corpus,
        *,
        global_batch: int | Callable[[int], int],
        rank: int,
        world_size: int,
        seed: int,
        split: str | None = None,
        seq_len: int | None = None,
        state: dict[str, Any] | None = None,
        device: torch.device | None = None,
    ):
        """`split` (of a dataset by itself) and `seq_len` default to those of `data`, the cursor to 0.

        `global_batch` is a number of samples, or tells it of the batch that begins at a cursor. Batches are brought to
        `device` ahead of their step; without one they stay on the CPU.
        """
        self.batch_at = global_batch if callable(global_batch) else lambda cursor: global_batch
        self.parts = parts_of(corpus, data.split if split is None else split)
        seq_len = data.seq_len if seq_len is None else seq_len
        streams = [Shards(part.info, part.split, seq_len, data.verify == "hashes") for part in self.parts]
        self.shards = Joined(streams)
        orders = [Order(stream.shard_samples, seed, data.shuffle) for stream in streams]
        self.order = MixedOrder(orders, [part.proportion for part in self.parts])
        self.data, self.rank, self.world_size = data, rank, world_size
        self.document_end, self.device = data.document_end(corpus), device
        self.cursor = 0
        self.fingerprint = self._fingerprint()
        if state is not None:
            _check_fingerprint(state["fingerprint"], self.fingerprint)
            self.cursor = state["cursor"]
        _check_shares(self.batch_at(self.cursor), rank, world_size)

    def _fingerprint(self) -> dict[str, Any]:
        """All that the order of the samples and their targets depend on, as JSON."""
        infos = [part.info for part in self.parts]
        splits = [part.split for part in self.parts]
        indexes = [part.info.split(part.split).index for part in self.parts]
        single = len(self.parts) == 1
        found: dict[str, Any] = {
            "split": splits[0] if single else splits,
            "index": indexes[0] if single else indexes,
            "tokenizer": infos[0].tokenizer,
            "seq_len": self.shards.seq_len,
        } | self.order.describe()
        if infos[0].answer_loss is not None:
            found["answer_loss"] = dataclasses.asdict(infos[0].answer_loss)
        if self.data.document_mask:
            found["document_mask"] = True
        return found

    @property
    def epochs(self) -> dict[str, float]:
        """Epochs of each stream that were seen so far, with their fraction. A dataset by itself has the name ""."""
        taken = self.order.taken(self.cursor)
        return {
            part.name: count / order.samples
            for part, count, order in zip(self.parts, taken.tolist(), self.order.orders, strict=True)
        }

    def state(self) -> dict[str, Any]:
        """Where the next batch starts, and in which order."""
        return {"cursor": self.cursor, "fingerprint": dict(self.fingerprint)}

    def __iter__(self) -> Generator[Batch, None, None]:
        steps = self._steps(self.cursor)
        with contextlib.closing(
            _batches(self.shards, steps, self.data.workers, self.document_end, self.device)
        ) as batches:
            for batch in batches:
                self.cursor += len(batch.sample_ids) * self.world_size
                yield batch

    def _steps(self, cursor: int) -> Iterator[np.ndarray]:
        while True:
            global_batch = self.batch_at(cursor)
            share = global_batch // self.world_size
            yield self.order.take(cursor + self.rank * share, share)
            cursor += global_batch


def _batches(
    shards: Samples, steps: Iterator[np.ndarray], workers: int, document_end: int | None, device: torch.device | None
) -> Generator[Batch, None, None]:
    """The batch of each step, on the device, the next one made while the caller uses one."""
    copy = DeviceCopy(device)

    def make() -> Generator[Batch, None, None]:
        with contextlib.closing(read_rows(shards, steps, workers)) as source:
            for samples, tokens_BT in source:
                yield copy.send(make_batch(samples, tokens_BT, shards.answer_loss, document_end))

    with contextlib.closing(prefetch(make())) as batches:
        for batch in batches:
            yield copy.receive(batch)


class ValidationBatches:
    """Samples of a split in file order, each once: all, or `limit` evenly spread ones. Can be iterated again and again.

    A file holds its documents in the order of their sources, so its first samples do not stand for it. `seed` alone
    decides which ones are taken, not the number of ranks or the batch.

    A step takes `batch` samples per rank, shared out as in training. All ranks make the same number of batches of the
    same shape: rows that fill up the last one have IGNORE_INDEX in every target and FILLER as their number, so a sum
    of losses over the targets that are not ignored is exact.
    """

    def __init__(
        self,
        data: Data,
        info: DatasetInfo,
        *,
        batch: int,
        rank: int,
        world_size: int,
        split: str = VALIDATION,
        seq_len: int | None = None,
        limit: int | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ):
        """`seq_len` defaults to that of `data`; see `Loader` for `device`."""
        _check_shares(batch * world_size, rank, world_size)
        self.shards = Shards(info, split, data.seq_len if seq_len is None else seq_len, data.verify == "hashes")
        self.samples = len(self.shards) if limit is None else min(limit, len(self.shards))
        self.offset = int(np.random.default_rng(seed).integers(len(self.shards)))
        self.batch, self.rank, self.world_size, self.workers = batch, rank, world_size, data.workers
        self.document_end, self.device = data.document_end(info), device

    def __len__(self) -> int:
        return -(-self.samples // (self.batch * self.world_size))

    def __iter__(self) -> Generator[Batch, None, None]:
        return _batches(self.shards, self._steps(), self.workers, self.document_end, self.device)

    def _steps(self) -> Iterator[np.ndarray]:
        for step in range(len(self)):
            numbers = np.arange(self.batch) + (step * self.world_size + self.rank) * self.batch
            spread = (numbers * len(self.shards) + self.offset) // self.samples  # numbers itself where all are taken
            yield np.where(numbers < self.samples, spread, FILLER)


def _check_shares(global_batch: int, rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank ({rank}) must be at least 0 and less than world_size ({world_size})")
    if global_batch < 1 or global_batch % world_size:
        raise UserError(f"global_batch ({global_batch} samples) must divide by world_size ({world_size})")


def _check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    changed = [
        f"{key} was {saved.get(key)!r} and is {current.get(key)!r}"
        for key in sorted(saved | current)
        if saved.get(key) != current.get(key)
    ]
    if changed:
        raise UserError(
            f"the data is not in the order that the checkpoint was in the middle of: {'; '.join(changed)}. "
            f"Restore the setting, or start from the model alone without the data position"
        )
