"""Short texts that the ranks leave for each other, beside all collectives and while these hang."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

PATIENCE_SECONDS = 10.0
"""How long to wait for the process that hosts the store; a run that hangs may hang because that one is gone."""
FAILED_KEY = "mosaic_dist/failed"

T = TypeVar("T")


class StoreThread:
    """A thread that talks to the store in which the ranks met, so that its callers can bound their waits.

    The store's own timeout bounds the wait for a key, not the wait for an answer: while the process that hosts the
    store is stopped (SIGSTOP), the client blocks in the kernel, for ever.
    """

    def __init__(self, connect: Callable[[], dist.Store]):
        self._connect = connect
        self._store: dist.Store | None = None
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="store", daemon=True).start()

    def submit(self, call: Callable[[dist.Store], T]) -> "Future[T]":
        """Let the thread call `call` with the store, after all that was submitted before."""
        future: Future[T] = Future()

        def answer() -> None:
            try:
                if self._store is None:
                    self._store = self._connect()
                future.set_result(call(self._store))
            except Exception as error:
                future.set_exception(error)

        self._calls.put(answer)
        return future

    def close(self) -> None:
        """End the thread when it has done what was submitted."""
        self._calls.put(None)

    def _serve(self) -> None:
        while (answer := self._calls.get()) is not None:
            answer()


class HeartbeatStore:
    """One text of each rank, in the store in which the ranks met, over a connection of its own.

    Every rank makes one, once the processes have met. One thread at a time may use it. No call waits for longer than
    `patience_seconds`; those that need an answer raise TimeoutError then, or what torch raises where the store is gone.
    """

    def __init__(self, name: str, rank: int, size: int, patience_seconds: float = PATIENCE_SECONDS):
        self.patience_seconds = patience_seconds
        self.keys = [f"mosaic_dist/{name}/{i}" for i in range(size)]
        self.mine = self.keys[rank]
        self._store = StoreThread(self._connect)
        self._text = ""
        self._put: Future[None] | None = None

    def put(self, text: str) -> "Future[None]":
        """Replace this rank's text, without waiting for the store; the result comes when it has the text."""
        self._text = text
        if self._put is None or self._put.done():  # else the thread is about to take the new text, or blocked
            self._put = self._store.submit(lambda store: store.set(self.mine, self._text))
        return self._put

    def read(self) -> list[str | None]:
        """The texts of all ranks; None of those that have left none."""
        return self._store.submit(self._read).result(self.patience_seconds)

    def is_first_to_fail(self) -> bool:
        """Whether no other rank has failed before this one."""
        return _is_first_to_fail(self._store, self.patience_seconds)

    def close(self) -> None:
        """Let go of the connection."""
        self._store.close()

    def _connect(self) -> dist.Store:
        store = _default_store().clone()
        store.set_timeout(timedelta(seconds=self.patience_seconds))
        return store

    def _read(self, store: dist.Store) -> list[str | None]:
        return [store.get(key).decode() if store.check([key]) else None for key in self.keys]


def is_first_to_fail() -> bool:
    """Whether no other rank has asked this before. False, too, where the others are already gone."""
    return _is_first_to_fail(StoreThread(_default_store), PATIENCE_SECONDS)


def _is_first_to_fail(thread: StoreThread, patience_seconds: float) -> bool:
    try:
        return thread.submit(lambda store: store.add(FAILED_KEY, 1)).result(patience_seconds) == 1
    except TimeoutError:  # rank 0 is stopped or cut off, and will not report anything
        return True
    except Exception:  # the store ended with the rank that failed first
        return False


def some_rank_failed() -> bool:
    """Whether a rank has asked `is_first_to_fail`, or the store ended with it. Blocks while rank 0 is stopped."""
    try:
        return _default_store().check([FAILED_KEY])
    except Exception:  # before the processes have met there is no store either
        return dist.is_initialized()


def _default_store() -> dist.Store:
    return torch.distributed.distributed_c10d._get_default_store()
