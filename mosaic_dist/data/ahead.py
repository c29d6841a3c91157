"""Reading ahead of the step: rows by some threads, finished batches by another.

Threads, not processes: reading, hashing and inflating do not hold Python's global lock, and rows go through no pipe.
A process that is forked while other threads work (a save in the background, say) can inherit a lock that nobody will
release, and a validation in the middle of a run would fork some each time.
"""

import collections
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from mosaic_dist.data.batch import FILLER
from mosaic_dist.data.shards import Samples

PREFETCHED_BATCHES = 4  # per worker

T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The items, each made by a thread while the caller uses the one before.

    What making an item raises comes when it is asked for. Closing waits for an item that is being made.
    """
    done: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        coming = thread.submit(next, items, done)
        while (item := coming.result()) is not done:
            coming = thread.submit(next, items, done)
            yield item


def read_rows(
    shards: Samples, steps: Iterable[np.ndarray], workers: int
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """(sample numbers, tokens) of each step, in order, read by threads some batches ahead; 0 workers: when asked for.

    What reading a batch raises comes when that batch is asked for. Closing waits for the batches that are being read.
    """
    if not workers:
        for samples in steps:
            yield samples, _read(shards, samples)
        return
    threads = ThreadPoolExecutor(workers, thread_name_prefix="rows")
    coming: collections.deque[tuple[np.ndarray, Future[np.ndarray]]] = collections.deque()
    try:
        for samples in steps:
            coming.append((samples, threads.submit(_read, shards, samples)))
            if len(coming) > PREFETCHED_BATCHES * workers:
                yield _taken(*coming.popleft())
        while coming:
            yield _taken(*coming.popleft())
    finally:
        threads.shutdown(cancel_futures=True)


def _taken(samples: np.ndarray, tokens_BT: "Future[np.ndarray]") -> tuple[np.ndarray, np.ndarray]:
    return samples, tokens_BT.result()


def _read(shards: Samples, samples: np.ndarray) -> np.ndarray:
    """Tokens [B, seq_len + 1]; zeros in the rows of FILLER."""
    tokens_BT = np.zeros((len(samples), shards.seq_len + 1), shards.dtype)
    real = samples != FILLER
    tokens_BT[real] = shards.read(samples[real])
    return tokens_BT
