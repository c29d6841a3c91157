"""Two gloo ranks that save together; each writes what it saw to `rank_<r>.json` for the tests to judge."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mosaic_dist.checkpoint import Checkpoint, CheckpointError, TensorShard, newest, save, steps, store
from tests.checkpoint.samples import SHAPES, cut, random_tensors

WORLD_SIZE = 2


def fail_with(error: Exception) -> Callable[..., Any]:
    def failing(*_: Any, **__: Any) -> Any:
        raise error

    return failing


def told(work: Callable[[], Any]) -> str:
    """The text of the CheckpointError that `work` raises."""
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return "no error"


def join() -> int:
    """Meet the other rank; the number of this one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return dist.get_rank()


def tell(folder: Path, rank: int, seen: dict[str, Any]) -> None:
    """Write down what this rank saw. When this returns, all ranks have."""
    (folder / f"rank_{rank}.json").write_text(json.dumps(seen))
    dist.barrier()


def end_alone(folder: Path, work: Callable[[], Any]) -> None:
    """Do work in which the other rank dies; write the error's name and the newest step to `died.json`, and end."""
    died = "no error"
    try:
        work()
    except Exception as error:
        died = type(error).__name__
    found = newest(folder / "bad")
    (folder / "died.json").write_text(json.dumps({"error": died, "newest": found and found.step}))
    os._exit(0)


def failures(root: Path, rank: int) -> dict[str, str]:
    """What this rank is told when one of them fails in each of the four steps."""
    halves = TensorShard("a", "master", 5 * rank, torch.full((5,), float(rank)))

    def attempt(
        piece: TensorShard = halves, shape: tuple[int, ...] = (10,), state: dict[str, Any] | None = None
    ) -> str:
        return told(lambda: save(root, 2, [piece], {"a": shape}, state or {}, {}, dist.group.WORLD))

    found = {
        "hole": attempt(halves._replace(data=halves.data[: 5 - rank])),
        "overlap": attempt(halves._replace(start=4 * rank, data=torch.ones(5 + rank))),
        "shape": attempt(shape=(10,) if rank else (2, 5)),
        "state": attempt(state={"a": object()}),
        "bad piece": attempt(halves._replace(data=halves.data.view(5, 1)) if rank else halves),
    }
    for name, failing_rank in (("write_tensors", 1), ("write_tensors", 0), ("publish_directory", 0)):
        working = getattr(store, name)
        if rank == failing_rank:
            setattr(store, name, fail_with(OSError(28, "No space left on device")))
        found[f"{name} {failing_rank}"] = attempt()
        setattr(store, name, working)
    found["folders"] = ",".join(sorted(path.name for path in root.iterdir()))
    found["at last"] = attempt()
    return found


def main(folder: Path) -> None:
    rank = join()
    store.BLOCK_BYTES = 500
    pieces = cut(random_tensors(), WORLD_SIZE)[rank]
    path = save(folder / "good", 100, pieces, SHAPES, {"from": rank}, {"generator": torch.full((3,), rank)})
    Checkpoint.open(path).verify(rank, WORLD_SIZE)
    save(folder / "bad", 1, pieces, SHAPES, {}, {}, dist.group.WORLD)
    seen = {"path": str(path), "failures": failures(folder / "bad", rank), "steps": steps(folder / "bad")}
    tell(folder, rank, seen)
    if rank == 1:
        os._exit(0)  # a rank that dies: the other one must not wait for ever, nor believe that it has saved
    end_alone(folder, lambda: save(folder / "bad", 3, pieces, SHAPES, {}, {}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
