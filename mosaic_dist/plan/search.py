"""Tries the layouts of a run on a cluster."""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from mosaic_dist.errors import UserError
from mosaic_dist.hardware import Device
from mosaic_dist.model import ActivationCheckpointing
from mosaic_dist.parallel.sequence import can_share
from mosaic_dist.plan.layout import make_layout, rank_groups
from mosaic_dist.plan.microbatch import run_microbatch
from mosaic_dist.plan.plan import Plan, finish_plan, setting_of
from mosaic_dist.run_spec import Run

STAGES = (0, 1, 2, 3)
MICRO_BATCHES = (1, 2, 4, 8)
PARTS: tuple[Literal["none", "moe", "full"], ...] = ("none", "moe", "full")
"""Of `ActivationCheckpointing.parts`, those that are tried."""
LONG_TOKENS = 32_768
"""Of a sequence that ranks may have to share."""
GIB = 2**30


class Refused(NamedTuple):
    """A layout that cannot be, and why."""

    layout: str
    reason: str
    peak_bytes: int = 0
    """Where it is the memory."""


class Tried(NamedTuple):
    """What a search found."""

    fitting: list[Plan]
    """The fastest first."""
    refused: list[Refused]


def search(run: Run, config: dict[str, Any], device: Device, nodes: int, node_ranks: int, budget: int | None) -> Tried:
    """Plan every expert-parallel degree x ranks to a sequence x ZeRO stage x micro-batch x recomputation.

    The rest is as the run says; ranks share sequences that are long, within nodes.
    """
    fitting: list[Plan] = []
    refused: list[Refused] = []
    for degree, shared, stage, micro_batch_size, parts in itertools.product(
        degrees(run, nodes * node_ranks), sharing(run, node_ranks), STAGES, MICRO_BATCHES, PARTS
    ):
        ranks = f"expert parallel {degree}, sequence parallel {shared}"
        named = f"{ranks}, ZeRO {stage}, micro-batch {micro_batch_size}, recomputed {parts}"
        recompute = ActivationCheckpointing(parts=parts)
        parallel = replace(
            run.parallel, expert_parallel=degree, sequence_parallel=shared, activation_checkpointing=recompute
        )
        tried = replace(run, micro_batch_size=micro_batch_size, parallel=parallel)
        staged = config | {"zero_optimization": config.get("zero_optimization", {}) | {"stage": stage}}
        try:
            layout = make_layout(tried, staged, device, nodes, node_ranks)
            groups = rank_groups(run.model, run.optimizer, degree)
        except UserError as error:
            refused.append(Refused(named, str(error)))
            continue
        plan = finish_plan(layout, groups, device, run_microbatch(setting_of(layout, device)), budget)
        if plan.fits:
            fitting.append(plan)
        else:
            refused.append(Refused(named, f"more than {device.memory_bytes / GIB:.1f} GiB", plan.memory.peak_bytes))
    return Tried(sorted(fitting, key=lambda plan: -plan.tokens_per_second), refused)


def sharing(run: Run, node_ranks: int) -> Iterable[int]:
    """How many ranks may share a sequence: of a long one up to a node's, of others as many as the run says."""
    if run.seq_len < LONG_TOKENS:
        return [run.parallel.sequence_parallel]
    divided = (node_ranks, run.seq_len)
    return [
        n
        for n in range(1, node_ranks + 1)
        if all(number % n == 0 for number in divided)
        and all(can_share(block.attention, n) for block in run.model.layers)
    ]


def degrees(run: Run, ranks: int) -> Iterable[int]:
    """Expert-parallel degrees that divide every layer's experts and the ranks."""
    experts: set[int] = {block.ffn.experts for block in run.model.layers if hasattr(block.ffn, "experts")}
    if not experts:
        return [1]
    return [n for n in range(1, ranks + 1) if ranks % n == 0 and all(count % n == 0 for count in experts)]
