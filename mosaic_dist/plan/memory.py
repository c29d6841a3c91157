"""Memory of a rank through a step: what lies there all the time, and what comes and goes with a micro-batch."""

from typing import NamedTuple

from mosaic_dist.plan.layout import Group, Layout
from mosaic_dist.plan.microbatch import Microbatch
from mosaic_dist.plan.states import States
from mosaic_dist.plan.traffic import gathers


class Point(NamedTuple):
    """Bytes at the fullest moment of a phase."""

    name: str
    gradients: int
    buffers: int
    activations: int


class Memory(NamedTuple):
    """What a rank needs."""

    states: States
    points: tuple[Point, ...]
    """The last micro-batch of a step, phase by phase, and the update."""

    @property
    def resident_bytes(self) -> int:
        """Weights and optimizer states."""
        return self.states.parameters + self.states.optimizer

    @property
    def peak(self) -> Point:
        """The fullest moment."""
        return max(self.points, key=lambda point: sum(point[1:]))

    @property
    def peak_bytes(self) -> int:
        """Of all tensors at the fullest moment."""
        return self.resident_bytes + sum(self.peak[1:])


def rank_memory(layout: Layout, groups: tuple[Group, ...], states: States, microbatch: Microbatch) -> Memory:
    """Put states and activations together.

    Without ZeRO and in stage 1 gradients grow as the backward pass goes, and are all there from the second micro-batch
    on. In stages 2 and 3 they pass through the bucket, which is reduced when a gradient is made; from the first
    reduction on there is the rank's share of them, in stage 2 beside that of the micro-batches before, unless it is
    added to sums in float32. What stage 3 gathers together stays as it came until the last of it is used: the head's
    table, in the forward pass; in the backward pass nothing is gathered that stayed whole.
    """
    of_parts, bucket = _elements_of_parts(groups), layout.zero["reduce_bucket_size"]
    is_later = layout.accumulation > 1
    is_gathered_again = layout.stage == 3 and gathers(layout, groups, uses=1) > 1
    made, points = 0, []
    for moment in microbatch.moments:
        made += of_parts.get(moment.part, 0) if moment.is_backward else 0
        is_reducing = layout.stage > 1 and (made > bucket or (layout.stage == 3 and moment.is_backward))
        buffers = states.gathered
        if is_gathered_again if moment.is_backward else moment.part != "head":
            buffers += states.arriving
        if moment.is_backward or is_later or layout.stage == 3:
            buffers += states.buffers
        gradients = states.gradients
        if layout.stage < 2 and not is_later:
            gradients = made * layout.dtype.itemsize
        elif layout.stage == 2:
            gradients *= min(1, is_later + is_reducing) if layout.sums_apart else is_later + is_reducing
        points.append(Point(moment.name, gradients, buffers, moment.peak_bytes))
        if is_reducing and states.reduced + moment.gradient_peak_bytes > moment.peak_bytes:
            points[-1] = Point(moment.name, gradients, buffers + states.reduced, moment.gradient_peak_bytes)
    points.append(Point("update", states.gradients, states.update + states.buffers, 0))
    return Memory(states, tuple(points))


def _elements_of_parts(groups: tuple[Group, ...]) -> dict[str, int]:
    """Parameters of each block, of the embedding with positions, and of the head with the last norm."""
    found: dict[str, int] = {}
    for group in groups:
        for name, size in zip(group.names, group.sizes, strict=True):
            first, *rest = name.split(".")
            part = f"layers.{rest[0]}" if first == "layers" else "head" if first in ("head", "norm") else "embedding"
            found[part] = found.get(part, 0) + size
    return found
