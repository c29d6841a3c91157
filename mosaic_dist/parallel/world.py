"""The processes of a run: who this one is, and how they meet."""

import importlib
import logging
import os
import re
import socket
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.utils import logger as deepspeed_logger

from mosaic_dist.errors import UserError
from mosaic_dist.memory import keep_freed_memory


class World(NamedTuple):
    """This process among those of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0


def rank_from_environment() -> int:
    """This process's rank before any process group exists (deepspeed, torchrun and srun all set it)."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def size_from_environment() -> int:
    """The number of processes of the run before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))


def local_size_from_environment() -> int:
    """The number of processes on this node; without a launcher's word all of them."""
    return _stated_local_size() or size_from_environment()


def _stated_local_size() -> int | None:
    """torchrun says LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE, srun its own, as 4 or 4(x2)."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE")
    stated = next((os.environ[name] for name in names if name in os.environ), None)
    return None if stated is None else int(re.split(r"\D", stated)[0])


def join_world(timeout_seconds: float) -> World:
    """Start the process group (nccl with a GPU, gloo without) and claim this process's device and CPU threads.

    Started without a launcher, the process is a world of one. Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT, or srun's variables. Raises what torch raises when the others do not come within the timeout.
    """
    _tame_deepspeed()
    rank, size, local_size = rank_from_environment(), size_from_environment(), local_size_from_environment()
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    device = choose_device(local_rank, _stated_local_size() or local_rank + 1)
    settings = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    os.environ.update({name: str(value) for name, value in settings.items()})
    if size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # from which DeepSpeed takes its device
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:  # else every process would want all cores
            torch.set_num_threads(max(1, available_cores() // local_size))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if device.type == "cuda" else None,
    )
    return World(rank, size, local_rank, local_size, device)


def choose_device(local_rank: int, local_size: int) -> torch.device:
    """The GPU of a process by its number among those of its node, or the CPU where there is no GPU.

    A process that sees one GPU takes that: `srun --gpus-per-task=1` shows each process its own. UserError, on all
    processes of the node, where they see several GPUs and not enough.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_size > gpus > 1:
        raise UserError(
            f"{local_size} processes on this node, but torch sees {gpus} GPUs; start {gpus} processes per node, or let "
            "each process see its own GPU only (srun --gpus-per-task=1)"
        )
    return torch.device("cuda", local_rank if gpus > 1 else 0)


def leave_world() -> None:
    """End the process group; without this, the interpreter's exit aborts."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _let_gloo_finish(patience_seconds=5.0)


def _let_gloo_finish(patience_seconds: float) -> None:
    """Wait until no thread of gloo runs.

    A thread of gloo may hold the last reference to the tensors of the last collective, and frees them with Python's
    global lock after the caller has long gone on. Where the interpreter is ending by then, the lock ends the thread
    inside a destructor and the process aborts: seen about once in a hundred starts on a busy machine. A thread that
    waits for the lock gets it while this one sleeps. Linux only: elsewhere nothing is waited for.
    """
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        time.sleep(0.002)
        if not any(_is_running_gloo(task) for task in Path("/proc/self/task").glob("*")):
            return


def _is_running_gloo(task: Path) -> bool:
    """Whether a thread of this process, by its folder in /proc, is one of gloo's and wants to run."""
    try:
        return "gloo" in (task / "comm").read_text() and "State:\tR" in (task / "status").read_text()
    except OSError:  # it has ended
        return False


def check_groups(asked: str, degree: int, world_size: int, local_size: int) -> None:
    """UserError where groups of `degree` ranks in a row leave some over, or straddle nodes; `asked` is the field."""
    if world_size % degree:
        raise UserError(f"{world_size} ranks do not divide by {asked} ({degree}); use {divisors(world_size)}")
    if local_size % degree and degree % local_size:
        raise UserError(
            f"{asked} ({degree}) would cut groups across nodes of {local_size} ranks; use {divisors(local_size)}, or a "
            f"multiple of {local_size}"
        )


def divisors(number: int, at_most: int | None = None) -> str:
    """All of them, for people."""
    return ", ".join(str(n) for n in range(1, (at_most or number) + 1) if number % n == 0)


T = TypeVar("T")


def on_main(world: World, action: Callable[[], T]) -> T:
    """Do something on the main process and give its result to all. What it raises, all raise. Every rank must call."""
    box: list[Any] = [None, None]
    if world.is_main:
        try:
            box[0] = action()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def gather_problems(problem: str | None) -> list[str]:
    """The problems of all ranks, in order of ranks; empty where all are well. Every rank must call."""
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, problem)
    return [text for text in told if text is not None]


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A TCP port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tame_deepspeed() -> None:
    """Let DeepSpeed say only what is wrong (DS_LOG_LEVEL asks for more) and not compile what is not used.

    On CPU it would build a shared-memory all-reduce for inference at every first start (20 to 40 s); training goes
    through gloo. It asks of every optimizer whether it is its own Muon, whose functions would load torch's compiler for
    their decoration alone, one second on each rank. That it calls collectives by names which torch 2.14 deprecates is
    nothing a user can mend.
    """
    calls = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", calls, FutureWarning)
    if "DS_LOG_LEVEL" not in os.environ:
        deepspeed_logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()


def _import_muon() -> None:
    whole, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = whole
