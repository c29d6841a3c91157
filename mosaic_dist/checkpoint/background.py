"""Saving while training goes on: a thread copies the state to host memory, and writes the copy.

Weights and optimizer states change in updates only, so the copy is made beside the forward and backward passes of the
next step, and training waits for what is left of it before its update.
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mosaic_dist.checkpoint.store import State, save
from mosaic_dist.checkpoint.tensor_shards import CheckpointError, TensorShard
from mosaic_dist.parallel import gather_problems

ALIGNMENT_BYTES = 64


class HostMemory:
    """Room on the host for a rank's pieces, pinned where there is a GPU; it grows when needed and is used again."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)

    def reserve(self, pieces: Sequence[TensorShard]) -> list[TensorShard]:
        """The pieces with room for their data here, which is theirs until the next call."""
        starts, end = [], 0
        for piece in pieces:
            starts.append(end)
            end += -(-piece.data.numel() * piece.data.element_size() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if end > len(self._room):
            self._room = torch.empty(0, dtype=torch.uint8)  # first give back what there is
            self._room = torch.empty(end, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        rooms = []
        for piece, start in zip(pieces, starts, strict=True):
            size = piece.data.numel() * piece.data.element_size()
            rooms.append(piece._replace(data=self._room[start : start + size].view(piece.data.dtype)))
        return rooms


def copy_data(
    pieces: Sequence[TensorShard], rooms: Sequence[TensorShard], stream: torch.cuda.Stream | None = None
) -> None:
    """Fill the rooms with the data of the pieces; on a GPU, on a stream of its own."""
    with torch.cuda.stream(stream):  # None is no stream
        for piece, room in zip(pieces, rooms, strict=True):
            room.data.copy_(piece.data.detach(), non_blocking=True)
    if stream is not None:
        stream.synchronize()


class BackgroundSave:
    """Saves one state at a time in a thread. Every rank makes one and calls its methods at the same steps.

    The ranks' threads talk over a group of their own, so that nothing of theirs can come between the collectives of
    training.
    """

    def __init__(self, timeout_seconds: float):
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        assert isinstance(group, dist.ProcessGroup), "every rank is in the group"
        self._group = group
        self._memory = HostMemory()
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._stall_seconds = 0.0
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the last save has come to its end with an error, as far as this rank knows."""
        return self._error is not None

    def start(self, root: str | Path, step: int, state: State, then: Callable[[float], None]) -> None:
        """Wait for the save before, then copy the state and write `root/step_<step>` in a thread; see `store.save`.

        Whoever changes the tensors of `state` calls `wait_for_copy` first. Once the checkpoint is there, the thread
        calls `then` with the seconds that training waited in this method and that. Raises CheckpointError on all ranks
        where one of them lacks the memory for the copy, and what `wait` raises.
        """
        self.wait()
        started, problem = time.monotonic(), None
        try:
            rooms = self._memory.reserve(state.pieces)
        except (RuntimeError, MemoryError) as error:
            problem = str(error)
        if problems := gather_problems(problem):
            told = f"no room in host memory for a copy of the state: {problems[0]}"
            raise CheckpointError(f"step {step} was not saved: {told}; use --checkpoint.asynchronous False")
        stream = None
        if torch.cuda.is_available():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())  # the update that made this state
        self._copied.clear()
        copy = functools.partial(copy_data, state.pieces, rooms, stream)
        write = functools.partial(save, root, step, *state._replace(pieces=rooms), self._group)
        self._thread = threading.Thread(target=self._run, args=(copy, write, then), daemon=True)
        self._thread.start()
        self._stall_seconds = time.monotonic() - started

    def _run(self, copy: Callable[[], None], write: Callable[[], object], then: Callable[[float], None]) -> None:
        try:
            try:
                copy()
            finally:
                self._copied.set()
            write()
            then(self._stall_seconds)
        except BaseException as error:
            self._error = error

    def wait_for_copy(self) -> None:
        """Wait until the tensors that were last handed over may change."""
        started = time.monotonic()
        self._copied.wait()
        self._stall_seconds += time.monotonic() - started

    def wait(self) -> float:
        """Wait until nothing is being saved; returns the seconds. Raises, once, what the save raised: on all ranks."""
        started = time.monotonic()
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return time.monotonic() - started

    def join(self, timeout_seconds: float | None = None) -> None:
        """Wait so long for the save that is under way, if there is one, whatever becomes of it."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
