"""Ranks of test_measured: train a step in every layout, and write down the bytes that lay there and that were sent."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mosaic_dist.parallel import Engine, join_world, leave_world
from tests.parallel.mixed import LEARNING_RATE, MODEL, batches, make_engine, my_part
from tests.plan.cases import CASES, PROFILED

KINDS = {
    "allreduce_": "all-reduce",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "alltoall_base_": "all-to-all",
}
PROFILED_STEPS = 5
"""The least of them counts: gloo's threads free what they sent when they get to it, at times long after its use."""


class Collectives(TorchDispatchMode):
    """Adds up what goes into each collective (what comes out of a gather), by kind and size of the group."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._overloadpacket.__name__
            tensors = [value for value in tree_leaves(args) if isinstance(value, torch.Tensor)]
            groups = [value for value in args if isinstance(value, torch.ScriptObject)]
            size = dist.ProcessGroup.unbox(groups[0]).size()
            whole = tensors if name == "allreduce_" else [max(tensors, key=lambda tensor: tensor.numel())]
            if name == "alltoall_base_":
                whole = tensors[1:]  # output, input
            if max(map(torch.Tensor.numel, tensors)) > 1 and size > 1:  # a single number is a loss or a norm
                self.bytes[f"{KINDS[name]} {size}"] += sum(tensor.nbytes for tensor in whole)
        return func(*args, **(kwargs or {}))


def states(engine: Engine) -> dict[str, int]:
    """Bytes of weights and of optimizer states that lie there between steps."""
    zero = engine.deepspeed.optimizer
    moments = [value for state in engine.deepspeed.basic_optimizer.state.values() for value in state.values()]
    masters: list[torch.Tensor] = []
    weights = list(engine.model.parameters())
    if engine.zero_stage in (1, 2):
        masters, weights = zero.single_partition_of_fp32_groups, zero.bit16_groups_flat
    elif engine.zero_stage == 3:
        masters = zero.fp32_partitioned_groups_flat
        weights = [tensor for weight in weights for tensor in (weight, weight.ds_tensor)]
    return {
        "parameters": sum(tensor.nbytes for tensor in weights),
        "optimizer": sum(tensor.nbytes for tensor in (*masters, *moments) if tensor.dim()),
    }


def gradients(engine: Engine) -> int:
    """Bytes of gradients between backward pass and update."""
    zero = engine.deepspeed.optimizer
    if engine.zero_stage == 3:
        return zero.grad_partitions_flat_buffer.nbytes
    held = [kept for weight in engine.model.parameters() for kept in (weight.grad, getattr(weight, "grad_accum", None))]
    if engine.zero_stage == 2:
        held = [tensor for kept in (zero.all_grad_tensors, zero.averaged_gradients) for tensor in tree_leaves(kept)]
        held = [getattr(kept, "flat_partition", kept) for kept in held]  # of sums in float32
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held if tensor is not None
    }
    return sum(storages.values())


def most_allocated(events: Any) -> int:
    """The most bytes at a time beyond those at the beginning, from what torch's allocator told the profiler."""
    live = most = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def measure(engine: Engine, inputs: torch.Tensor, targets: torch.Tensor, is_profiled: bool) -> dict[str, Any]:
    """One step, counted; then more, if what they allocate is to be counted as well."""
    seen: list[int] = []
    step, counted = engine.deepspeed.step, Collectives()
    forward, backward = engine.deepspeed.forward, engine.deepspeed.backward

    def counting(call: Any) -> Any:
        def inside(*words: Any, **named: Any) -> Any:
            with counted:
                return call(*words, **named)

        return inside

    def stepping() -> None:
        seen.append(gradients(engine))
        with counted:
            step()

    engine.deepspeed.step = stepping
    engine.deepspeed.forward, engine.deepspeed.backward = counting(forward), counting(backward)
    engine.train_step(inputs, targets, LEARNING_RATE)
    told: dict[str, Any] = {"gradients": seen, "sent": counted.bytes}
    if not is_profiled:
        return told
    engine.deepspeed.step, engine.deepspeed.forward, engine.deepspeed.backward = step, forward, backward
    most: list[int] = []
    for _ in range(PROFILED_STEPS):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            engine.train_step(inputs, targets, LEARNING_RATE)
        most.append(most_allocated(profile.profiler.kineto_results.events()))
    return told | {"most": min(most)}


def main(output: str) -> None:
    """Write what each rank found as JSON: by layout, a list over ranks."""
    world = join_world(60)
    found: dict[str, list[Any]] = {}
    for measured in CASES:
        engine = make_engine(world, measured.case, MODEL, measured.parallel, **measured.zero)
        of_rank = world._replace(rank=engine.sequences.data_rank, size=engine.sequences.data_ranks)
        mine, (first, second, *_) = my_part(of_rank), batches()
        engine.train_step(first[0][mine], first[1][mine], LEARNING_RATE)  # makes the moments
        told = states(engine) | measure(engine, second[0][mine], second[1][mine], measured in PROFILED)
        found[measured.name] = [None] * world.size
        dist.all_gather_object(found[measured.name], told)
    if world.is_main:
        Path(output).write_text(json.dumps(found))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
