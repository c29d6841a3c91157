"""Ranks, nodes and groups: who holds what, and who talks to whom."""

import dataclasses
import functools
import math
from collections import Counter
from typing import Any, NamedTuple

import torch

from mosaic_dist.hardware import Device
from mosaic_dist.model import Transformer
from mosaic_dist.optim import Optimizer
from mosaic_dist.parallel import (
    check_sequence_parallel,
    choose_degree,
    expert_counts,
    place_experts,
    resolve_precision,
    zero_stage,
)
from mosaic_dist.parallel.engine import split_expert_groups
from mosaic_dist.run_spec import Run


class Span(NamedTuple):
    """A group of ranks, as the network sees it."""

    ranks: int
    in_node: int
    """Of them in each node."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A run on a cluster: rank r is number r % node_ranks of node r // node_ranks."""

    run: Run
    config: dict[str, Any]
    """The DeepSpeed config, filled in."""
    precision: str
    degree: int
    accumulation: int
    """Of the full batch."""
    nodes: int
    node_ranks: int

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.nodes * self.node_ranks

    @property
    def stage(self) -> int:
        """ZeRO's."""
        return zero_stage(self.config)

    @property
    def zero(self) -> dict[str, Any]:
        """ZeRO's settings, with DeepSpeed's values where nothing is said."""
        return ZERO_DEFAULTS | {"overlap_comm": self.stage == 3} | self.config["zero_optimization"]

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]

    @property
    def gradient_itemsize(self) -> int:
        """Bytes of an element of the gradients that are summed over micro-batches."""
        is_fp32 = self.config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        return 4 if is_fp32 else self.dtype.itemsize

    @property
    def sums_apart(self) -> bool:
        """Whether gradients are summed in a wider dtype than they are made in."""
        return self.gradient_itemsize > self.dtype.itemsize

    def expert_group(self, rank: int) -> range:
        """The ranks that share the experts of a layer with this one: neighbours."""
        first = rank - rank % self.degree
        return range(first, first + self.degree)

    def expert_data_group(self, rank: int) -> range:
        """The ranks that hold the same experts as this one."""
        return range(rank % self.degree, self.ranks, self.degree)

    @property
    def sequence_group(self) -> range:
        """Ranks that share sequences: neighbours, and all groups of them lie alike."""
        return range(self.run.parallel.sequence_parallel)

    def span(self, group: range) -> Span:
        """How a group lies over the nodes; the engine's rules let it lie alike in all that it touches."""
        return Span(len(group), len(group) // len({rank // self.node_ranks for rank in group}))


ZERO_DEFAULTS: dict[str, Any] = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
"""DeepSpeed's own, in elements (deepspeed/runtime/zero/config.py)."""


def make_layout(run: Run, config: dict[str, Any], device: Device, nodes: int, node_ranks: int) -> Layout:
    """Settle what the engine would settle, with its own rules. UserError for a layout that it would refuse."""
    ranks = nodes * node_ranks
    precision = _precision(run, config, device)
    degree = choose_degree(run.parallel.expert_parallel, list(_experts(run.model)), ranks, node_ranks)
    check_sequence_parallel(run.model, run.parallel.sequence_parallel, run.seq_len, ranks, node_ranks)
    accumulation = run.accumulation(ranks)
    run.check_ramp(ranks)
    filled = run.fill_config(config, precision, ranks)
    return Layout(run, filled, precision, degree, accumulation, nodes, node_ranks)


@functools.cache
def _experts(model: Transformer) -> tuple[int, ...]:
    with torch.device("meta"):
        return tuple(expert_counts(model.build()))


def _precision(run: Run, config: dict[str, Any], device: Device) -> Any:
    """As `resolve_precision`, which looks at this machine's devices where it is not told."""
    asked: Any = device.natural_precision if run.precision == "auto" else run.precision
    device.rate(asked)
    if asked == "fp16":  # which is refused on this machine if it has no GPU; ZeRO's rule is that of bf16
        resolve_precision("bf16", {"zero_optimization": config.get("zero_optimization", {})})
        return asked
    return resolve_precision(asked, config)


class Group(NamedTuple):
    """A group of parameters that the optimizer updates together, in order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of each parameter as a rank holds it."""
    uses: tuple[int, ...]
    """Modules that have it: two for a table that the head shares."""
    is_expert: bool
    """Whether its parameters are those of experts that are shared out."""
    by_muon: bool
    """Whether it is updated by Muon, not AdamW."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def elements(self) -> int:
        """Of all its parameters."""
        return sum(self.sizes)


@functools.cache
def rank_groups(model: Transformer, optimizer: Optimizer, degree: int, rank: int = 0) -> tuple[Group, ...]:
    """The optimizer's groups of a rank, as the engine makes them."""
    module = build_rank(model, degree, rank)
    names = {parameter: name for name, parameter in module.named_parameters()}
    uses = Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))
    groups = []
    for group in split_expert_groups(optimizer.groups(module, model.width_factors())):
        held = group["params"]
        is_expert = not getattr(held[0], "allreduce", True)
        of_each = (tuple(names[p] for p in held), tuple(tuple(p.shape) for p in held), tuple(uses[p] for p in held))
        groups.append(Group(*of_each, is_expert, group.get("by_muon", False)))
    return tuple(groups)


def build_rank(model: Transformer, degree: int, rank: int) -> Any:
    """What a rank holds of a model, on the meta device."""
    with torch.device("meta"):
        module = model.build()
    place_experts(module, degree, rank)
    return module
