"""Two gloo ranks that save in the background; each writes what it saw to `rank_<r>.json` for the tests to judge."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mosaic_dist.checkpoint import background, save, steps, store
from mosaic_dist.checkpoint.background import BackgroundSave
from mosaic_dist.checkpoint.store import State
from mosaic_dist.checkpoint.tensor_shards import TensorShard
from tests.checkpoint.ranks import WORLD_SIZE, end_alone, fail_with, join, tell, told
from tests.checkpoint.samples import SHAPES, cut, random_tensors

HELD_SECONDS = 0.5


def own_state(seed: int, rank: int) -> State:
    pieces = [piece._replace(data=piece.data.clone()) for piece in cut(random_tensors(seed), WORLD_SIZE)[rank]]
    return State(pieces, SHAPES, {"seed": seed}, {"generator": torch.full((3,), rank)})


def spoil(pieces: list[TensorShard]) -> None:
    """What the next optimizer step does to the tensors that were handed over."""
    for piece in pieces:
        piece.data.zero_()


def train_while(is_held: Callable[[], bool]) -> bool:
    """Collectives of the default group, as many on every rank; whether all sums were right."""
    right = True
    for i in range(200):
        total = torch.tensor([float(i), float(is_held())])
        dist.all_reduce(total)
        right &= total[0].item() == WORLD_SIZE * i
    return right


def good(folder: Path, rank: int) -> dict[str, Any]:
    """Two saves at once, the writing of each held back on one rank, against the same saves in the foreground."""
    for step in (1, 2):
        save(folder / "sync", step, *own_state(step, rank))
    saver, go, finished = BackgroundSave(60), threading.Event(), list[float]()
    write, copy = store.write_tensors, background.copy_data

    def held_write(*words: Any) -> Any:
        if rank == 0:
            go.wait()
        return write(*words)

    def held_copy(*words: Any) -> None:
        time.sleep(HELD_SECONDS)
        copy(*words)

    store.write_tensors, background.copy_data = held_write, held_copy
    first, second = own_state(1, rank), own_state(2, rank)
    saver.start(folder / "async", 1, first, finished.append)
    saver.wait_for_copy()
    spoil(first.pieces)
    background.copy_data = copy
    seen: dict[str, Any] = {"trained": train_while(lambda: not go.is_set()), "during": steps(folder / "async")}
    threading.Timer(HELD_SECONDS, go.set).start()
    started = time.monotonic()
    saver.start(folder / "async", 2, second, finished.append)
    seen["waited"] = time.monotonic() - started
    saver.wait_for_copy()
    spoil(second.pieces)
    seen["again"] = saver.wait()
    store.write_tensors = write
    return seen | {"after": steps(folder / "async"), "stalls": finished, "failed": saver.has_failed}


def bad(folder: Path, rank: int) -> dict[str, Any]:
    """What this rank is told when the disk, or the memory, of one of them is full."""
    root, saver, finished = folder / "bad", BackgroundSave(60), []
    saver.start(root, 1, own_state(1, rank), finished.append)
    saver.wait()
    write, reserve = store.write_tensors, background.HostMemory.reserve
    if rank == 1:
        store.write_tensors = fail_with(OSError(28, "No space left on device"))
    saver.start(root, 2, own_state(2, rank), finished.append)
    saver.join()
    seen: dict[str, Any] = {"failed": saver.has_failed, "disk": told(saver.wait), "failed again": saver.has_failed}
    store.write_tensors = write
    if rank == 1:
        background.HostMemory.reserve = fail_with(RuntimeError("not enough memory"))
    seen["memory"] = told(lambda: saver.start(root, 3, own_state(3, rank), finished.append))
    background.HostMemory.reserve = reserve
    seen |= {"folders": sorted(path.name for path in root.iterdir()), "finished": len(finished)}
    saver.start(root, 4, own_state(4, rank), finished.append)
    return seen | {"at last": told(saver.wait), "steps": steps(root)}


def main(folder: Path) -> None:
    rank = join()
    tell(folder, rank, {"good": good(folder, rank), "bad": bad(folder, rank)})
    if rank == 1:  # dies while it writes: the other must not wait for ever, nor believe that it has saved
        store.write_tensors = lambda *_: os._exit(0)
    saver = BackgroundSave(60)
    saver.start(folder / "bad", 5, own_state(5, rank), lambda seconds: None)
    end_alone(folder, saver.wait)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
