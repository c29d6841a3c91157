"""Processes, expert parallelism, and the DeepSpeed engine: the only place that knows DeepSpeed.

What needs DeepSpeed is imported when it is asked for: it takes most of a second, which who only reads a run's
description does without.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns at every import that it chose so

from mosaic_dist.parallel.deepspeed_config import Precision, fill_config, read_config, resolve_precision, zero_stage
from mosaic_dist.parallel.heartbeat_store import HeartbeatStore, is_first_to_fail, some_rank_failed
from mosaic_dist.parallel.spec import Parallel

if TYPE_CHECKING:
    from mosaic_dist.parallel.dispatcher import choose_degree, expert_counts, place_experts
    from mosaic_dist.parallel.engine import Engine, StepResult
    from mosaic_dist.parallel.sequence import Sequences, check_sequence_parallel, place_sequences
    from mosaic_dist.parallel.world import (
        World,
        gather_problems,
        join_world,
        leave_world,
        local_size_from_environment,
        on_main,
        rank_from_environment,
        size_from_environment,
    )

__all__ = [
    "Engine",
    "HeartbeatStore",
    "Parallel",
    "Precision",
    "Sequences",
    "StepResult",
    "World",
    "check_sequence_parallel",
    "choose_degree",
    "expert_counts",
    "fill_config",
    "gather_problems",
    "is_first_to_fail",
    "join_world",
    "leave_world",
    "local_size_from_environment",
    "on_main",
    "place_experts",
    "place_sequences",
    "rank_from_environment",
    "read_config",
    "resolve_precision",
    "size_from_environment",
    "some_rank_failed",
    "zero_stage",
]

_WITH_DEEPSPEED = ("world", "dispatcher", "sequence", "engine")


def __getattr__(name: str) -> Any:
    """A name of one of the modules that import DeepSpeed (PEP 562)."""
    if name in __all__:
        for module in _WITH_DEEPSPEED:
            found = getattr(importlib.import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
