"""Ranks that take steps under a watch, until one hangs in the data of the third one; test_watch starts them.

The words: how it hangs, the limit in seconds, the folder, and which rank it is.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mosaic_dist.parallel import join_world, leave_world
from mosaic_dist.train.watchdog import Watchdog

SECONDS = 300
HANGS = {
    "lock": lambda: ctypes.PyDLL(None).sleep(SECONDS),  # with Python's global lock
    "gone": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "never": lambda: None,
}


def fetch(step: int) -> None:
    """Get the data of a step."""
    if step == 3 and dist.get_rank() == int(sys.argv[4]):
        HANGS[sys.argv[1]]()


if __name__ == "__main__":
    world = join_world(SECONDS)
    watch = Watchdog(world, float(sys.argv[2]), Path(sys.argv[3]))
    for step in range(1, 6):
        watch.enter(step, "data")
        fetch(step)
        watch.enter(step, "update")
        dist.all_reduce(torch.ones(1))
    watch.close()
    leave_world()
