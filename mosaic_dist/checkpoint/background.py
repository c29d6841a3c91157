"""Saving while training goes on: the state is copied to host memory, and a thread writes the copy."""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mosaic_dist.checkpoint.pieces import CheckpointError, Piece
from mosaic_dist.checkpoint.store import State, save
from mosaic_dist.parallel import gather_problems

ALIGNMENT_BYTES = 64


class HostMemory:
    """Room on the host for a rank's pieces, pinned where there is a GPU; it grows when needed and is used again."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces with their data copied here, where they stay until the next call."""
        starts, end = [], 0
        for piece in pieces:
            starts.append(end)
            end += -(-piece.data.numel() * piece.data.element_size() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if end > len(self._room):
            self._room = torch.empty(0, dtype=torch.uint8)  # first give back what there is
            self._room = torch.empty(end, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        copies = []
        for piece, start in zip(pieces, starts, strict=True):
            size = piece.data.numel() * piece.data.element_size()
            room = self._room[start : start + size].view(piece.data.dtype)
            copies.append(piece._replace(data=room.copy_(piece.data.detach(), non_blocking=True)))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies


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
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the last save has come to its end with an error, as far as this rank knows."""
        return self._error is not None

    def start(self, root: str | Path, step: int, state: State, then: Callable[[float], None]) -> None:
        """Wait for the save before, copy the state, and write `root/step_<step>` in a thread; see `store.save`.

        Once it is there, the thread calls `then` with the seconds that the copy took. Raises CheckpointError on all
        ranks where one of them lacks the memory for the copy, and what `wait` raises.
        """
        self.wait()
        started, problem = time.monotonic(), None
        try:
            copied = state._replace(pieces=self._memory.copy(state.pieces))
        except (RuntimeError, MemoryError) as error:
            problem = str(error)
        if problems := gather_problems(problem):
            told = f"no room in host memory for a copy of the state: {problems[0]}"
            raise CheckpointError(f"step {step} was not saved: {told}; use --checkpoint.asynchronous False")
        finish = functools.partial(then, time.monotonic() - started)
        self._thread = threading.Thread(target=self._write, args=(root, step, copied, finish), daemon=True)
        self._thread.start()

    def _write(self, root: str | Path, step: int, state: State, finish: Callable[[], None]) -> None:
        try:
            save(root, step, *state, self._group)
            finish()
        except BaseException as error:
            self._error = error

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
