"""What a run will need and how long it will take, in one value."""

import dataclasses
import functools
from typing import Any

from mosaic_dist.hardware import Device
from mosaic_dist.model import Counts, Transformer, count_parameters
from mosaic_dist.model.count import flops_per_token
from mosaic_dist.plan.duration import Duration, step_duration
from mosaic_dist.plan.layout import Group, Layout, make_layout, rank_groups
from mosaic_dist.plan.memory import Memory, rank_memory
from mosaic_dist.plan.microbatch import Microbatch, Setting, run_microbatch
from mosaic_dist.plan.ramp import Ramp, plan_ramp
from mosaic_dist.plan.states import rank_states
from mosaic_dist.plan.traffic import Flow, step_traffic
from mosaic_dist.run_spec import Run

SECONDS_PER_HOUR, SECONDS_PER_DAY = 3600, 86400
HOST_BYTES_PER_ELEMENT = 4
"""A rank makes its float32 weights in the node's memory before they go to the device."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a cluster, with what follows from it."""

    layout: Layout
    device: Device
    memory: Memory
    """Of the rank that needs most."""
    microbatch: Microbatch
    flows: list[Flow]
    duration: Duration
    model_flops_per_token: float
    total_parameters: int
    active_parameters: int
    rank_elements: int
    """Parameters of which a rank holds the weights, or with stage 3 gathers them."""
    budget_tokens: int
    ramp: Ramp
    """What of these goes into smaller batches."""
    node_memory_bytes: float | None = None
    """Of a node's host; None: not known."""

    @property
    def fits(self) -> bool:
        """Whether the tensors are smaller than the device's memory, and what lies on the host than the node's."""
        fits_node = self.node_memory_bytes is None or self.node_bytes <= self.node_memory_bytes
        return self.memory.peak_bytes <= self.device.memory_bytes and fits_node

    @property
    def node_bytes(self) -> int:
        """On the host of a node: the weights that all its ranks make at the start, and what is offloaded."""
        of_rank = self.rank_elements * HOST_BYTES_PER_ELEMENT + self.memory.states.host
        return of_rank * self.layout.node_ranks

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster."""
        return self.layout.run.batch_tokens / self.duration.total

    @property
    def mfu(self) -> float:
        """Model-FLOPs utilisation: of the device's rate, without what runs twice (arXiv 2204.02311, appendix B)."""
        return self.tokens_per_second * self.model_flops_per_token / self.layout.ranks / self.rate

    @property
    def rate(self) -> float:
        """The device's, in the run's precision."""
        return self.device.rate(self.layout.precision)

    @property
    def seconds(self) -> float:
        """For the budget of tokens."""
        return self.ramp.seconds + (self.budget_tokens - self.ramp.tokens) / self.tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, for programs."""
        layout, memory = self.layout, self.memory
        return {
            "run": layout.run.name,
            "device": self.device.to_dict(),
            "layout": {
                "nodes": layout.nodes,
                "node_ranks": layout.node_ranks,
                "ranks": layout.ranks,
                "expert_parallel": layout.degree,
                "sequence_parallel": layout.run.parallel.sequence_parallel,
                "zero_stage": layout.stage,
                "precision": layout.precision,
                "micro_batch_size": layout.run.micro_batch_size,
                "accumulation": layout.accumulation,
                "seq_len": layout.run.seq_len,
                "batch_tokens": layout.run.batch_tokens,
                "activation_checkpointing": layout.run.parallel.activation_checkpointing.to_dict(),
            },
            "parameters": {"total": self.total_parameters, "active": self.active_parameters},
            "fits": self.fits,
            "memory_bytes": {
                **memory.states._asdict(),
                "activations": memory.peak.activations,
                "peak": memory.peak_bytes,
                "peak_at": memory.peak.name,
                "host_at_start": self.rank_elements * HOST_BYTES_PER_ELEMENT,
                "node_host": self.node_bytes,
            },
            "traffic": [
                {
                    "kind": flow.kind,
                    "what": flow.what,
                    "ranks": flow.span.ranks,
                    "handed_over_bytes": flow.handed_over,
                    "sent_in_node_bytes": flow.sent_inside,
                    "sent_between_nodes_bytes": flow.sent_between,
                }
                for flow in self.flows
            ],
            "flops": {
                "model_per_token": self.model_flops_per_token,
                "executed_per_rank_and_step": self.microbatch.flops * layout.accumulation,
            },
            "seconds": self.duration._asdict() | {"step": self.duration.total},
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "budget_tokens": self.budget_tokens,
            "ramp": self.ramp._asdict(),
            "days": self.seconds / SECONDS_PER_DAY,
            "gpu_hours": self.seconds * layout.ranks / SECONDS_PER_HOUR,
        }


def make_plan(
    run: Run,
    config: dict[str, Any],
    device: Device,
    nodes: int,
    node_ranks: int,
    budget_tokens: int | None = None,
    node_memory_bytes: float | None = None,
) -> Plan:
    """Plan a run (see `layout.make_layout` for what is refused); `budget_tokens` None: those of the run's steps."""
    layout = make_layout(run, config, device, nodes, node_ranks)
    groups = rank_groups(run.model, run.optimizer, layout.degree)
    plan = finish_plan(layout, groups, device, run_microbatch(setting_of(layout, device)), budget_tokens)
    return dataclasses.replace(plan, node_memory_bytes=node_memory_bytes)


def setting_of(layout: Layout, device: Device) -> Setting:
    """The micro-batch of a layout, with the kernels of a device."""
    run = layout.run
    has_flash = device.kind == "cuda" and device.bf16 > 0 and layout.precision != "fp32"
    return Setting(
        model=run.model,
        degree=layout.degree,
        sequences=run.micro_batch_size,
        seq_len=run.seq_len,
        dtype=layout.dtype,
        activation_checkpointing=run.parallel.activation_checkpointing,
        expert_chunks=run.parallel.expert_chunks,
        sequence_parallel=run.parallel.sequence_parallel,
        documents=run.data.document_mask,
        attention="cpu" if device.kind == "cpu" else "flash" if has_flash else "efficient",
        grouped=device.grouped and layout.precision == "bf16",
    )


def finish_plan(
    layout: Layout, groups: tuple[Group, ...], device: Device, microbatch: Microbatch, budget_tokens: int | None
) -> Plan:
    """A plan from its parts, of which a micro-batch can serve several."""
    run = layout.run
    ranks = {0, layout.ranks // 2, layout.ranks - 1}
    memories = [rank_memory(layout, groups, rank_states(layout, groups, rank), microbatch) for rank in sorted(ranks)]
    flows = step_traffic(layout, groups, microbatch)
    counts, model_flops = _figures(run.model, run.seq_len)
    budget_tokens = budget_tokens or run.tokens_after(run.steps)
    return Plan(
        layout=layout,
        device=device,
        memory=max(memories, key=lambda memory: memory.peak_bytes),
        microbatch=microbatch,
        flows=flows,
        duration=step_duration(layout, groups, microbatch, flows, device),
        model_flops_per_token=model_flops,
        total_parameters=counts.total,
        active_parameters=counts.active,
        rank_elements=sum(group.elements for group in groups),
        budget_tokens=budget_tokens,
        ramp=plan_ramp(layout, groups, microbatch, device, budget_tokens),
    )


@functools.cache
def _figures(model: Transformer, seq_len: int) -> tuple[Counts, float]:
    return count_parameters(model), flops_per_token(model, seq_len)
