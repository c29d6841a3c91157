"""Processes that share the documents of an evaluation. Without a launcher there is one, and no process group."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from mosaic_dist.errors import UserError
from mosaic_dist.parallel import World, gather_problems, join_world, size_from_environment

TIMEOUT_SECONDS = 24 * 3600.0
"""How long ranks wait for the one with the longest documents."""


def meet() -> World:
    """This process among those that a launcher started, or alone."""
    if size_from_environment() > 1:
        return join_world(TIMEOUT_SECONDS)
    return World(0, 1, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def sum_over_ranks(world: World, work: Callable[[], Tensor]) -> Tensor:
    """The sum of what `work` gives each rank, on all of them. An error on one is a UserError on all."""
    if world.size == 1:
        return work()
    problem, found = None, None
    try:
        found = work()
    except UserError as error:
        problem = str(error)
    except Exception as error:  # or the others would wait for this rank
        problem = f"{type(error).__name__} on rank {world.rank}: {error}"
    problems = gather_problems(problem)
    if problems:
        raise UserError(problems[0])
    assert found is not None, "there was no problem"
    total = found.to(world.device)
    dist.all_reduce(total)
    return total.cpu()
