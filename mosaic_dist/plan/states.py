"""Weights, gradients and optimizer states of a rank, to the byte, as DeepSpeed's ZeRO stages keep them.

Rajbhandari et al., arXiv 1910.02054. Stages 1 and 2 cut each optimizer group, as one flat tensor, evenly over the ranks
that hold it; stage 3 cuts each parameter.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from mosaic_dist.optim.muon import BATCH_ELEMENTS
from mosaic_dist.plan.layout import Group, Layout

MOMENTS_BYTES = 8
"""Of an element: AdamW's two, float32. Muon has one."""
MASTER_BYTES = 4
"""Of an element: ZeRO's float32 copy of the weights, which it also makes where they are float32."""
ALIGNMENT = 2
"""Stages 1 and 2 pad a group to a multiple of so many elements per rank (NCCL's alignment, DeepSpeed says)."""
REPLICATED_BUCKET = 500_000_000
"""Elements that are reduced together without ZeRO."""


class States(NamedTuple):
    """Bytes of one rank."""

    parameters: int
    gradients: int
    """What is there of them after a backward pass."""
    optimizer: int
    """Moments, and with ZeRO float32 copies."""
    buffers: int
    """DeepSpeed's bucket, which gradients pass through."""
    reduced: int
    """A bucket once more, as it is while it is reduced."""
    gathered: int
    """Stage 3: weights that are whole for the moment."""
    arriving: int
    """Stage 3: weights that were prefetched together, as they came from the ranks; cut apart they count as gathered."""
    update: int
    """Made for the update itself, when activations are gone."""
    host: int
    """In the node's memory for this rank: what is offloaded."""


def rank_states(layout: Layout, groups: tuple[Group, ...], rank: int) -> States:
    """Estimate weights, gradients and optimizer states per rank. Ranks differ only where a group's padding or a
    parameter's end falls.
    """
    make = {0: _replicated, 1: _flat_groups, 2: _flat_groups, 3: _partitioned}[layout.stage]
    return _offloaded(layout, groups, make(layout, groups, rank))


def holders(layout: Layout, group: Group) -> int:
    """Ranks that hold the parameters of a group."""
    return layout.ranks // layout.degree if group.is_expert else layout.ranks


def padded(layout: Layout, group: Group) -> int:
    """Elements of a group's flat tensor in stages 1 and 2."""
    multiple = ALIGNMENT * holders(layout, group)
    return math.ceil(group.elements / multiple) * multiple


def piece(layout: Layout, group: Group, size: int) -> int:
    """Elements that each rank holds of a parameter in stage 3."""
    return math.ceil(size / holders(layout, group))


def held(layout: Layout, group: Group) -> int:
    """Elements of a group whose optimizer states a rank keeps."""
    if layout.stage == 0:
        return group.elements
    if layout.stage == 3:
        return sum(piece(layout, group, size) for size in group.sizes)
    return padded(layout, group) // holders(layout, group)


def moments(group: Group) -> int:
    """Bytes of optimizer states of an element, beside its float32 copy."""
    return MOMENTS_BYTES // 2 if group.by_muon else MOMENTS_BYTES


def _kept(layout: Layout, groups: tuple[Group, ...]) -> int:
    """Bytes of moments and, with ZeRO, float32 copies."""
    masters = MASTER_BYTES if layout.stage else 0
    return sum(held(layout, group) * (masters + moments(group)) for group in groups)


def _orthogonal(layout: Layout, group: Group, elements: int) -> int:
    """About what Muon needs to update so many elements: Nesterov's step, before and after, and room for a batch."""
    if not group.by_muon:
        return 0
    size = 2 if layout.precision == "bf16" else 4
    return elements * (4 + 2 * size) + 4 * min(elements, BATCH_ELEMENTS) * size


def _replicated(layout: Layout, groups: tuple[Group, ...], rank: int) -> States:
    elements = sum(group.elements for group in groups)
    whole = elements * layout.dtype.itemsize
    bucket = min(elements, REPLICATED_BUCKET) * layout.dtype.itemsize
    update = max(bucket, *(_orthogonal(layout, group, max(group.sizes)) for group in groups))
    return States(whole, whole, _kept(layout, groups), 0, 0, 0, 0, update, 0)


def _flat_groups(layout: Layout, groups: tuple[Group, ...], rank: int) -> States:
    size, elements = layout.dtype.itemsize, sum(group.elements for group in groups)
    in_bucket = layout.gradient_itemsize if layout.stage == 1 else size
    bucket = layout.zero["reduce_bucket_size"] * in_bucket * (2 if layout.zero["overlap_comm"] else 1)
    reduced = min(layout.zero["reduce_bucket_size"], elements) * in_bucket  # flattened once more for the collective
    shares = [(group, held(layout, group)) for group in groups]
    if layout.sums_apart:  # the sums are this rank's share of each group, which the update takes as they are
        kept, copied = sum(n for _, n in shares) * layout.gradient_itemsize, 0
    else:
        kept = sum(sum(_touched(layout, group, rank)) for group in groups) * size
        copied = 4 + (size if size < 4 else 0)
    update = max(n * copied + _orthogonal(layout, group, n) for group, n in shares)
    gradients = kept
    if layout.stage == 1:
        gradients, update = elements * layout.gradient_itemsize, max(update, reduced + kept)
    weights = sum(padded(layout, group) for group in groups) * size
    return States(weights, gradients, _kept(layout, groups), bucket, reduced, 0, 0, update, 0)


def _touched(layout: Layout, group: Group, rank: int) -> Iterator[int]:
    """Elements of each parameter whose part, however small, this rank updates: it keeps their gradients whole."""
    share = padded(layout, group) // holders(layout, group)
    low = (rank // layout.degree if group.is_expert else rank) * share
    at = 0
    for size in group.sizes:
        if at < low + share and at + size > low:
            yield size
        at += size


def _partitioned(layout: Layout, groups: tuple[Group, ...], rank: int) -> States:
    size, zero = layout.dtype.itemsize, layout.zero
    pieces = sum(held(layout, group) for group in groups)
    whole = [n for group in groups for n in group.sizes if is_persistent(layout, n)]
    passing = sum(group.elements for group in groups) - sum(whole)
    bucket = zero["reduce_bucket_size"] * size
    reduced = min(zero["reduce_bucket_size"], passing) * size
    ahead = zero["stage3_prefetch_bucket_size"]
    live = zero["stage3_max_live_parameters"] if ahead else zero["stage3_max_reuse_distance"]
    gathered = min(passing, max(live, _largest_layer(groups))) * size
    # weights are prefetched until there are so many; those of the module at hand are cut apart at once
    arriving = min(passing, ahead + max(max(group.sizes) for group in groups)) * size if ahead else 0
    summed = layout.gradient_itemsize
    update = min(pieces, zero["sub_group_size"]) * (4 + (summed if summed < 4 else 0))
    update += max(_orthogonal(layout, group, min(held(layout, group), zero["sub_group_size"])) for group in groups)
    weights = (pieces + sum(whole)) * size
    return States(weights, pieces * summed, _kept(layout, groups), bucket, reduced, gathered, arriving, update, 0)


def is_persistent(layout: Layout, size: int) -> bool:
    """Whether stage 3 leaves a parameter of so many elements whole on every rank."""
    return size <= layout.zero["stage3_param_persistence_threshold"]


def _largest_layer(groups: tuple[Group, ...]) -> int:
    """Elements of the experts of a layer, which are gathered together, or of the largest other parameter."""
    layers: dict[str, int] = {}
    for group in groups:
        for name, size in zip(group.names, group.sizes, strict=True):
            layer = name.partition(".experts.")[0]
            layers[layer] = layers.get(layer, 0) + size
    return max(layers.values())


def _offloaded(layout: Layout, groups: tuple[Group, ...], states: States) -> States:
    """What DeepSpeed's CPU offload moves to the host; gradients of offloaded optimizers are float32 there."""
    offload = {key for key in ("offload_optimizer", "offload_param") if _is_on_cpu(layout, key)}
    host = 0
    if "offload_optimizer" in offload:
        host += states.optimizer + sum(held(layout, group) for group in groups) * MASTER_BYTES
        states = states._replace(optimizer=0, update=0)
    if "offload_param" in offload:
        host += states.parameters
        states = states._replace(parameters=0)
    return states._replace(host=host)


def _is_on_cpu(layout: Layout, key: str) -> bool:
    return (layout.zero.get(key) or {}).get("device", "none") == "cpu"
