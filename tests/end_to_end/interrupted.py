"""A recipe of which one rank gets a stop signal in the middle of a step, and again while it saves; or a full disk.

The environment says which rank (FAULT_RANK), in which step or in the save of which step (FAULT_STEP), and which signal
(FAULT, such as SIGTERM) or DISK_FULL. The rank's own children get a signal too, as they do from a launcher. SIGINT
comes as Ctrl-C in a terminal: once, to the launcher and all processes of its group.
"""

import errno
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from mosaic_dist.checkpoint import background, store
from mosaic_dist.parallel import Engine, rank_from_environment
from mosaic_dist.run import main
from recipes.t4_moe import run

DISK_FULL = "full"
COPY_DELAY_SECONDS = 1.0


def send(number: signal.Signals) -> None:
    """Signal this process and all that it has started; for SIGINT, what the terminal does."""
    if number == signal.SIGINT:
        os.killpg(os.getpgid(os.getppid()), number)
        return
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        process.send_signal(number)


def arm(number: signal.Signals, step: int) -> None:
    """Send the signal in the middle of a step, and again while its checkpoint is written."""
    update, write = Engine._update, store.write_tensors
    sent: list[int] = []

    def interrupted_update(engine: Engine, learning_rate: float) -> Any:
        if engine.deepspeed.global_steps == step - 1:
            sent.append(number)
            send(number)
        return update(engine, learning_rate)

    def interrupted_write(*words: Any) -> Any:
        for again in sent:
            if again != signal.SIGINT:
                send(again)
        return write(*words)

    Engine._update, store.write_tensors = interrupted_update, interrupted_write  # type: ignore[method-assign]


def fill_disk(step: int) -> None:
    """Let the disk be full when the checkpoint of a step is written."""
    write = store.write_tensors

    def full_write(path: Path, tensors: Mapping[str, Tensor]) -> Any:
        if f"{step:08d}" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, tensors)

    store.write_tensors = full_write


def slow_copies() -> None:
    """Let the copy of a background save begin so late that an update that does not wait for it would be in it."""
    copy = background.copy_data

    def late_copy(*words: Any) -> None:
        time.sleep(COPY_DELAY_SECONDS)
        copy(*words)

    background.copy_data = late_copy


if __name__ == "__main__":
    slow_copies()
    if rank_from_environment() == int(os.environ["FAULT_RANK"]):
        fault, step = os.environ["FAULT"], int(os.environ["FAULT_STEP"])
        if fault == DISK_FULL:
            fill_disk(step)
        else:
            arm(signal.Signals[fault], step)
    main(run)
