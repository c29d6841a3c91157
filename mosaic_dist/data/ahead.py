"""Reading ahead of the step: rows by worker processes, finished batches by a thread."""

import functools
import os
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mosaic_dist.data.batch import FILLER
from mosaic_dist.data.shards import Samples
from mosaic_dist.errors import UserError

PREFETCHED_BATCHES = 4  # per worker
STALL_SECONDS = 600  # a worker that gives no batch for so long is an error, not a hang

T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The items, each made by a thread while the caller uses the one before.

    The first is made in the caller's thread, so that worker processes are forked there, from one that holds no lock.
    What making an item raises comes when it is asked for. Closing waits for an item that is being made.
    """
    done = object()
    item: Any = next(items, done)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        while item is not done:
            coming = thread.submit(next, items, done)
            yield item
            item = coming.result()


def read_rows(
    shards: Samples, steps: Iterable[np.ndarray], workers: int
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
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


class _Reader(Dataset[Any]):
    """Runs in the workers. Errors meant for the user are returned, since torch would bury them in a traceback.

    Arrays, not tensors, are returned: they travel through a pipe, so a small /dev/shm is no limit.
    """

    def __init__(self, shards: Samples):
        self.shards = shards

    def __getitem__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray] | UserError:
        tokens_BT = np.zeros((len(samples), self.shards.seq_len + 1), self.shards.dtype)
        real = samples != FILLER
        try:
            tokens_BT[real] = self.shards.read(samples[real])
        except UserError as error:
            return error
        return samples, tokens_BT


def _start_worker(parent: int, worker: int) -> None:
    """End this worker when its parent is gone. After a kill -9, torch's own check ends in a wait for the full pipe."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_is(item: Any) -> Any:
    return item
