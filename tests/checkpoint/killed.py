"""Saves that are killed; run as `python -m tests.checkpoint.killed FOLDER`, prints what it has tried as JSON.

One process imports torch and forks a child for each kill, so that a kill costs milliseconds.
"""

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mosaic_dist.checkpoint import Checkpoint, TensorShard, newest, prune, save

# What the package calls to change the disk; a child dies just before the n-th of these calls.
CHANGES = {"open", "write", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink"}
RANDOM_KILLS = 25
ELEMENTS = 2_000_000


def save_constant(root: Path, step: int, value: int, elements: int = 1000) -> None:
    piece = TensorShard("a", "master", 0, torch.full((elements,), float(value)))
    save(root, step, [piece], {"a": (elements,)}, {"value": value}, {})


def check(root: Path) -> tuple[int, int]:
    """The newest checkpoint must be whole in every byte; returns its step and value."""
    found = newest(root)
    assert isinstance(found, Checkpoint), "nothing is left"
    found.verify()
    data = found.read_full("a", "master")
    assert bool((data == found.state["value"]).all()), "two saves are mixed"
    return found.step, found.state["value"]


def in_child(work: Callable[[], None]) -> int:
    """Fork; returns the child's id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def save_twice_and_prune(root: Path, die_at: int) -> None:
    """Dies before the `die_at`-th change of the disk, and exits with 0 when there were fewer."""
    done = 0

    def trace(frame: Any, event: str, argument: Any) -> None:
        nonlocal done
        if event == "c_call" and argument.__name__ in CHANGES:
            done += 1
            if done == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(trace)
    save_constant(root, 2, 20)
    save_constant(root, 2, 21)
    prune(root, 1)
    sys.setprofile(None)
    os._exit(0)


def kill_before_each_change(root: Path) -> list[tuple[int, int]]:
    """What was newest after each kill, in the order of the points."""
    found = []
    for die_at in range(1, 1000):
        shutil.rmtree(root, ignore_errors=True)
        save_constant(root, 1, 10)
        _, status = os.waitpid(in_child(functools.partial(save_twice_and_prune, root, die_at)), 0)
        found.append(check(root))
        if os.waitstatus_to_exitcode(status) == 0:
            return found
        save_constant(root, 3, 30)  # the next save gets on with what the crash left behind
        assert check(root) == (3, 30)
        assert all(path.name.startswith("step_") for path in root.iterdir()), list(root.iterdir())
    raise AssertionError("the child never came to its end")


def save_for_ever(root: Path, first: int) -> None:
    """Every step is saved twice, so a kill may also fall into the replacement of a checkpoint."""
    for value in range(first, first + 10_000):
        save_constant(root, value // 2, value, ELEMENTS)
        prune(root, 2)


def kill_at_random(root: Path) -> list[tuple[int, int]]:
    chance = random.Random(0)
    save_constant(root, 1, 2, ELEMENTS)
    found = [check(root)]
    for _ in range(RANDOM_KILLS):
        child = in_child(functools.partial(save_for_ever, root, found[-1][1] + 1))
        time.sleep(chance.uniform(0.002, 0.15))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "the child failed by itself"
        found.append(check(root))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    folder = Path(sys.argv[1])
    print(json.dumps({"each": kill_before_each_change(folder / "each"), "random": kill_at_random(folder / "random")}))
