"""Batches for training and validation, with one global cursor as the whole state.

A step with a global batch of G samples takes positions cursor ... cursor + G of the order (`order.py`), and rank r of W
the r-th of W equal parts of them. The order knows neither ranks nor workers, so a run continues with the same samples
in every step on another number of either, and nothing is dropped where epochs meet. Shards are read map-style through
streaming's MDS reader; see `mds.py` for why not through StreamingDataset.
"""

import dataclasses
import functools
import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mosaic_dist.data.answer import AnswerLoss
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.encode import VALIDATION
from mosaic_dist.data.order import Order
from mosaic_dist.data.settings import Data
from mosaic_dist.data.shards import Shards
from mosaic_dist.errors import UserError
from mosaic_dist.targets import IGNORE_INDEX

FILLER = -1  # the sample number of a row that only fills up a batch
PREFETCHED_BATCHES = 4  # per worker
STALL_SECONDS = 600  # a worker that gives no batch for so long is an error, not a hang


class Batch(NamedTuple):
    """One rank's share of a step: int64 [B, T] on the CPU, pinned where there is CUDA, and the B sample numbers.

    Targets that are not scored (the prompts of a dataset with an `answer_loss`, fillers) are IGNORE_INDEX. With
    `data.document_mask`, `documents_BT` counts the documents of each row from 0, as `document_numbers` does.
    """

    inputs_BT: torch.Tensor
    targets_BT: torch.Tensor
    sample_ids: list[int]
    documents_BT: torch.Tensor | None = None


class Loader:
    """Training batches of one rank, for ever. Iterating starts at the cursor.

    `state()` is plain JSON and counts only samples whose batch was handed out; `Loader(..., state=...)` goes on there.
    `global_batch` and `world_size` may have changed in between; a changed dataset, seed, order or sequence length
    raises UserError, because samples would be repeated or lost in silence.
    """

    def __init__(
        self,
        data: Data,
        info: DatasetInfo,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        split: str | None = None,
        seq_len: int | None = None,
        state: dict[str, Any] | None = None,
    ):
        """`split` and `seq_len` default to those of `data`; without a `state` the cursor starts at 0."""
        _check_shares(global_batch, rank, world_size)
        split = data.split if split is None else split
        self.shards = Shards(info, split, data.seq_len if seq_len is None else seq_len, data.verify == "hashes")
        self.order = Order(self.shards.shard_samples, seed, data.shuffle)
        self.data, self.global_batch, self.rank, self.world_size = data, global_batch, rank, world_size
        self.document_end = data.document_end(info)
        self.cursor = 0
        self.fingerprint: dict[str, Any] = {
            "split": split,
            "index": info.split(split).index,
            "tokenizer": info.tokenizer,
            "seq_len": self.shards.seq_len,
        } | self.order.describe()
        if info.answer_loss is not None:
            self.fingerprint["answer_loss"] = dataclasses.asdict(info.answer_loss)
        if data.document_mask:
            self.fingerprint["document_mask"] = True
        if state is not None:
            _check_fingerprint(state["fingerprint"], self.fingerprint)
            self.cursor = state["cursor"]

    @property
    def epoch(self) -> float:
        """Epochs seen so far, with their fraction."""
        return self.cursor / len(self.shards)

    def state(self) -> dict[str, Any]:
        """Where the next batch starts, and in which order."""
        return {"cursor": self.cursor, "fingerprint": dict(self.fingerprint)}

    def __iter__(self) -> Iterator[Batch]:
        for samples, tokens_BT in _read_ahead(self.shards, self._steps(self.cursor), self.data.workers):
            self.cursor += self.global_batch
            yield _make_batch(samples, tokens_BT, self.shards.answer_loss, self.document_end)

    def _steps(self, cursor: int) -> Iterator[np.ndarray]:
        share = self.global_batch // self.world_size
        while True:
            yield self.order.take(cursor + self.rank * share, share)
            cursor += self.global_batch


class ValidationBatches:
    """Every sample of a split once, in file order; the first `limit` if given. Can be iterated again and again.

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
    ):
        """`seq_len` defaults to that of `data`."""
        _check_shares(batch * world_size, rank, world_size)
        self.shards = Shards(info, split, data.seq_len if seq_len is None else seq_len, data.verify == "hashes")
        self.samples = len(self.shards) if limit is None else min(limit, len(self.shards))
        self.batch, self.rank, self.world_size, self.workers = batch, rank, world_size, data.workers
        self.document_end = data.document_end(info)

    def __len__(self) -> int:
        return -(-self.samples // (self.batch * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        for samples, tokens_BT in _read_ahead(self.shards, self._steps(), self.workers):
            yield _make_batch(samples, tokens_BT, self.shards.answer_loss, self.document_end)

    def _steps(self) -> Iterator[np.ndarray]:
        for step in range(len(self)):
            numbers = np.arange(self.batch) + (step * self.world_size + self.rank) * self.batch
            yield np.where(numbers < self.samples, numbers, FILLER)


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


def document_numbers(inputs_BT: torch.Tensor, document_end: int) -> torch.Tensor:
    """int64 [B, T]: the documents that ended before each token in its row. An end belongs to the document it ends."""
    ends_BT = (inputs_BT == document_end).long()
    return ends_BT.cumsum(1) - ends_BT


def _make_batch(
    samples: np.ndarray, tokens_BT: np.ndarray, answer_loss: AnswerLoss | None, document_end: int | None
) -> Batch:
    tokens = torch.from_numpy(tokens_BT.astype(np.int64))
    inputs_BT, targets_BT = tokens[:, :-1].clone(), tokens[:, 1:].clone()  # one row would share its memory
    targets_BT[torch.from_numpy(samples == FILLER)] = IGNORE_INDEX
    if answer_loss is not None:
        targets_BT[torch.from_numpy(answer_loss.unscored(tokens_BT))] = IGNORE_INDEX
    documents_BT = None if document_end is None else document_numbers(inputs_BT, document_end)
    if torch.cuda.is_available():
        inputs_BT, targets_BT = inputs_BT.pin_memory(), targets_BT.pin_memory()
        documents_BT = None if documents_BT is None else documents_BT.pin_memory()
    return Batch(inputs_BT, targets_BT, samples.tolist(), documents_BT)


# --- reading ahead ------------------------------------------------------------------------------------------------


class _Reader(Dataset[Any]):
    """Runs in the workers. Errors meant for the user are returned, since torch would bury them in a traceback.

    Arrays, not tensors, are returned: they travel through a pipe, so a small /dev/shm is no limit.
    """

    def __init__(self, shards: Shards):
        self.shards = shards

    def __getitem__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray] | UserError:
        tokens_BT = np.zeros((len(samples), self.shards.seq_len + 1), self.shards.dtype)
        real = samples != FILLER
        try:
            tokens_BT[real] = self.shards.read(samples[real])
        except UserError as error:
            return error
        return samples, tokens_BT


def _read_ahead(shards: Shards, steps: Iterable[np.ndarray], workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(sample numbers, tokens) of each step, in order, read by worker processes some batches ahead."""
    source = DataLoader(
        _Reader(shards),
        sampler=steps,
        batch_size=None,  # each item of the sampler is a whole batch
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
        timeout=STALL_SECONDS if workers else 0,
        worker_init_fn=functools.partial(_start_worker, os.getpid()),
        generator=torch.Generator(),  # else the default one would be advanced, and dropout changed by a resume
    )
    for item in source:
        if isinstance(item, UserError):
            raise item
        yield item


def _start_worker(parent: int, worker: int) -> None:
    """End this worker when its parent is gone. After a kill -9, torch's own check ends in a wait for the full pipe."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_is(item: Any) -> Any:
    return item
