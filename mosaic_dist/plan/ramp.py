"""The smaller batches of a ramp: they have fewer micro-batches, and a step's fixed costs all the same."""

import dataclasses
from collections import Counter
from typing import NamedTuple

from mosaic_dist.hardware import Device
from mosaic_dist.plan.duration import step_duration
from mosaic_dist.plan.layout import Group, Layout
from mosaic_dist.plan.microbatch import Microbatch
from mosaic_dist.plan.traffic import step_traffic


class Ramp(NamedTuple):
    """What the steps before the first full one come to."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def plan_ramp(
    layout: Layout, groups: tuple[Group, ...], microbatch: Microbatch, device: Device, budget_tokens: int
) -> Ramp:
    """The ramp of a run, as far as a budget of tokens reaches."""
    run, sizes, tokens = layout.run, Counter[int](), 0
    for size in () if run.batch_ramp is None else run.batch_ramp.batches(run.batch_tokens):
        if tokens >= budget_tokens:
            break
        sizes[size] += 1
        tokens += size
    seconds = 0.0
    for size, steps in sizes.items():
        smaller = dataclasses.replace(layout, accumulation=layout.accumulation * size // run.batch_tokens)
        flows = step_traffic(smaller, groups, microbatch)
        seconds += steps * step_duration(smaller, groups, microbatch, flows, device).total
    return Ramp(sizes.total(), tokens, seconds)
