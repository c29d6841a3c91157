"""Reading ahead of the step: rows by some threads, finished batches by another.

Threads, not processes: reading, hashing and inflating do not hold Python's global lock, and rows go through no pipe.
A process that is forked while other threads work (a save in the background, say) can inherit a lock that nobody will
release, and a validation in the middle of a run would fork some each time.
"""

import collections
import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from mosaic_dist.data.batch import FILLER
from mosaic_dist.data.shards import Samples

PREFETCHED_BATCHES = 4  # per worker
CLOSING_SECONDS = 5.0

T = TypeVar("T")


class Background:
    """Threads that do what they are given, in order.

    Unlike those of an executor they do not keep a process that ends waiting for what they do: a file system that does
    not answer, or a long download, must not hold up a rank that has failed or was told to stop.
    """

    def __init__(self, threads: int, name: str):
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., T], *words: Any) -> "Future[T]":
        """Have a thread call a function."""
        future: Future[T] = Future()
        self._jobs.put((future, functools.partial(function, *words)))
        return future

    def close(self, last: Callable[[], object] = lambda: None) -> None:
        """Drop what has not begun, have `last` called, and wait a little for the threads to end."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        self.submit(last)
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + CLOSING_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, call = job
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


def prefetch(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The items, each made by a thread while the caller uses the one before.

    What making an item raises comes when it is asked for. Closing also closes `items`, after the one in the making.
    """
    done: Any = object()
    thread = Background(1, "batches")
    try:
        coming = thread.submit(next, items, done)
        while (item := coming.result()) is not done:
            coming = thread.submit(next, items, done)
            yield item
    finally:
        thread.close(last=items.close)


def read_rows(
    shards: Samples, steps: Iterable[np.ndarray], workers: int
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """(sample numbers, tokens) of each step, in order, read by threads some batches ahead; 0 workers: when asked for.

    What reading a batch raises comes when that batch is asked for.
    """
    if not workers:
        for samples in steps:
            yield samples, _read(shards, samples)
        return
    threads = Background(workers, "rows")
    coming: collections.deque[tuple[np.ndarray, Future[np.ndarray]]] = collections.deque()
    try:
        for samples in steps:
            coming.append((samples, threads.submit(_read, shards, samples)))
            if len(coming) > PREFETCHED_BATCHES * workers:
                yield _taken(*coming.popleft())
        while coming:
            yield _taken(*coming.popleft())
    finally:
        threads.close()


def _taken(samples: np.ndarray, tokens_BT: "Future[np.ndarray]") -> tuple[np.ndarray, np.ndarray]:
    return samples, tokens_BT.result()


def _read(shards: Samples, samples: np.ndarray) -> np.ndarray:
    """Tokens [B, seq_len + 1]; zeros in the rows of FILLER."""
    tokens_BT = np.zeros((len(samples), shards.seq_len + 1), shards.dtype)
    real = samples != FILLER
    tokens_BT[real] = shards.read(samples[real])
    return tokens_BT
