"""How long a step takes, by a roofline: each operation is as slow as its arithmetic or its memory traffic.

Williams et al. 2009, doi 10.1145/1498765.1498785. `ASSUMPTIONS` says what this leaves out.
"""

import math
from typing import NamedTuple

import torch

from mosaic_dist.hardware import Device
from mosaic_dist.optim.muon import ITERATIONS
from mosaic_dist.plan.layout import Group, Layout
from mosaic_dist.plan.microbatch import Microbatch
from mosaic_dist.plan.states import holders
from mosaic_dist.plan.traffic import Flow

UPDATE_BYTES = 28
"""Of an element: weight and both moments read and written, the gradient read, all float32."""

ASSUMPTIONS = (
    "matrix products reach the `reachable` share of the device's rate, whatever their shapes",
    "every other operation reads and writes memory at the full rate; starting kernels takes no time",
    "links run at their full rate, the links inside a node and between nodes at the same time",
    "nothing overlaps: products, other operations, exchange, reduction, gathering and update come one after another",
    "experts get equally many rows, no rank waits for another, and reading data takes no time",
)


class Duration(NamedTuple):
    """Seconds of a step on each rank, by what they go to."""

    products: float
    """Matrix products and attention."""
    other: float
    """All other operations."""
    exchange: float
    """Rows to experts and back, and heads to where they are scored and back."""
    gradients: float
    weights: float
    update: float
    """With what Muon sends and multiplies for it."""

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(self)


def step_duration(
    layout: Layout, groups: tuple[Group, ...], microbatch: Microbatch, flows: list[Flow], device: Device
) -> Duration:
    """Estimate the time of a step from its FLOPs, its traffic and the device's rates."""
    seconds = {True: 0.0, False: 0.0}
    for work, times in microbatch.work.items():
        arithmetic = 0.0
        if work.is_product:
            arithmetic = work.flops / (device.rate(PRECISIONS[work.dtype]) * device.reachable)
        seconds[work.is_product] += times * max(arithmetic, work.bytes / device.memory_bytes_per_second)
    on_links = dict.fromkeys(("rows", "heads", "loads", "gradients", "weights", "matrices"), 0.0)
    for flow in flows:
        inside = flow.sent_inside / device.node_bytes_per_second
        between = flow.sent_between / device.network_bytes_per_second
        on_links[flow.what.split()[0]] += max(inside, between)
    sharers = [holders(layout, group) if layout.stage else 1 for group in groups]
    shares = sum(group.elements / ranks for group, ranks in zip(groups, sharers, strict=True))
    muon = sum(_muon_flops(group) / ranks for group, ranks in zip(groups, sharers, strict=True))
    return Duration(
        products=seconds[True] * layout.accumulation,
        other=seconds[False] * layout.accumulation,
        exchange=on_links["rows"] + on_links["heads"] + on_links["loads"],
        gradients=on_links["gradients"],
        weights=on_links["weights"],
        update=shares * UPDATE_BYTES / device.memory_bytes_per_second
        + muon / (device.rate(layout.precision) * device.reachable)
        + on_links["matrices"],
    )


def _muon_flops(group: Group) -> float:
    """Operations of making a group's matrices orthogonal, three products for each iteration; 0 for AdamW's."""
    flops = 0.0
    for *stack, rows, columns in group.shapes if group.by_muon else ():
        small, large = sorted((rows, columns))
        flops += math.prod(stack) * ITERATIONS * (4 * small**2 * large + 2 * small**3)
    return flops


PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
