"""`python -m mosaic_dist doctor`."""

import sys
from pathlib import Path

import torch.distributed as dist

from mosaic_dist.doctor.check_result import render
from mosaic_dist.doctor.examine import FAILED_EXIT_CODE, examine
from mosaic_dist.errors import UserError
from mosaic_dist.parallel import World, join_world, leave_world
from mosaic_dist.spec import PositiveFloat


def doctor(folder: str = "runs", exchange_factor: PositiveFloat = 0.5, timeout_seconds: PositiveFloat = 120.0) -> None:
    """Examine this machine, or all nodes of a job: devices, memory, versions, clock, storage, links.

    Alone, or as ranks under deepspeed, torchrun or srun. Prints a table with what was found, what is asked for, and
    what to do; exit code 1 if any check failed.

    --folder DIR          where runs will write
    --exchange_factor X   a rank must exchange with at least X of the median speed of all
    --timeout_seconds N   how long ranks wait for each other
    """
    world = meet(timeout_seconds)
    rows = examine(world, Path(folder), exchange_factor)
    if world.is_main:
        print(render(rows), flush=True)
    leave_world()
    if any(row.verdict == "fail" for row in rows):
        sys.exit(FAILED_EXIT_CODE)


def meet(timeout_seconds: float) -> World:
    """`join_world`; UserError where not all ranks come."""
    try:
        return join_world(timeout_seconds)
    except dist.DistError as error:
        raise UserError(
            f"not all ranks met within {timeout_seconds:g} s ({str(error).splitlines()[0]}); is MASTER_PORT open "
            "between the nodes, and is NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME a network that all of them share?"
        ) from None
