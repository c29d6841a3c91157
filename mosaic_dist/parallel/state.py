"""Where this rank's part of the weights and optimizer states lies: intervals of named, flattened global tensors.

Every combination of ZeRO stage and expert parallelism leaves a rank with flat float32 buffers that hold stretches of
parameters. `shards` names these stretches; reading and writing the state of a run is then the same for all of them.
All knowledge of DeepSpeed's private attributes (0.19) is in this file and in `partition.py`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor

from mosaic_dist.model import GroupedLinear
from mosaic_dist.parallel.engine import Engine
from mosaic_dist.parallel.loss_scale import restore_scale, scale_state
from mosaic_dist.parallel.partition import partitioned_parameters


def buffers(engine: Engine) -> dict[str, Tensor]:
    """Buffers of the model that are part of its state, by name; the same on all ranks."""
    found = {}
    for module_name, module in engine.model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{module_name}.{name}"] = buffer
    return found


class LocalShard(NamedTuple):
    """Elements [start, start + length) of the flattened global tensor `name` are `flat[offset : offset + length]`."""

    name: str
    start: int
    length: int
    flat: Tensor
    """Float32 buffer, which is what the optimizer updates (one-dimensional view)."""
    offset: int
    key: Tensor
    """The optimizer's own parameter, under which its state is kept."""
    is_writer: bool
    """False where another rank holds the same elements and writes them."""


class GlobalTensor(NamedTuple):
    """A parameter as the whole model has it."""

    name: str
    shape: tuple[int, ...]
    first_element: int
    """Where this rank's part begins in the flattened tensor (its experts; 0 for all other parameters)."""


def global_tensors(engine: Engine) -> dict[torch.nn.Parameter, GlobalTensor]:
    """Every parameter of this rank's model, named and with its global shape. A shared parameter has its first name."""
    found: dict[torch.nn.Parameter, GlobalTensor] = {}
    for module_name, module in engine.model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            first = 0
            if isinstance(module, GroupedLinear):
                first = module.first_expert * math.prod(shape[1:])
                shape = (module.total_experts, *shape[1:])
            found.setdefault(parameter, GlobalTensor(f"{module_name}.{name}", shape, first))
    return found


def shards(engine: Engine) -> Iterator[LocalShard]:
    """The stretches of parameters whose float32 values and optimizer states this rank holds."""
    return _partitioned(engine) if engine.zero_stage else _replicated(engine)


def _replicated(engine: Engine) -> Iterator[LocalShard]:
    """ZeRO 0: whole parameters, the same on all ranks of their group; the group's first rank writes."""
    for parameter, tensor in global_tensors(engine).items():
        group = None
        if not getattr(parameter, "allreduce", True):
            group = groups._get_expert_data_parallel_group(parameter.group_name)  # type: ignore[attr-defined]
        flat = parameter.data.view(-1)
        yield LocalShard(
            tensor.name, tensor.first_element, flat.numel(), flat, 0, parameter, is_writer=dist.get_rank(group) == 0
        )


def _partitioned(engine: Engine) -> Iterator[LocalShard]:
    """ZeRO 1, 2 and 3: what `partition.py` tells of this rank."""
    tensors = global_tensors(engine)
    for held in partitioned_parameters(engine.deepspeed.optimizer, engine.zero_stage):
        part = held.cut.part(dist.get_rank(held.group))
        if part is not None:
            tensor, flat = tensors[held.parameter], held.flat
            start = tensor.first_element + part.start
            yield LocalShard(tensor.name, start, part.length, flat.data, part.offset, flat, is_writer=True)


def optimizer_tensors(engine: Engine, shard: LocalShard) -> dict[str, Tensor]:
    """The optimizer's states of a shard by kind (`exp_avg`, ...): views of `length` elements."""
    state = _inner_optimizer(engine).state.get(shard.key, {})
    return {
        kind: value.data.view(-1)[shard.offset : shard.offset + shard.length]
        for kind, value in state.items()
        if isinstance(value, Tensor) and value.numel() == shard.flat.numel() and value.dim() > 0
    }


def make_optimizer_tensors(engine: Engine, kinds: Mapping[str, Iterable[str]], step: float) -> None:
    """Give every optimizer parameter the update count and, where it has none yet, states (zeros).

    `kinds` tells those of a global tensor; all that an optimizer parameter holds parts of have the same.
    """
    optimizer = _inner_optimizer(engine)
    for name, key in {id(shard.key): (shard.name, shard.key) for shard in shards(engine)}.values():
        state = optimizer.state[key]
        for kind in kinds[name]:
            if kind not in state:
                state[kind] = torch.zeros_like(key.data)
        state["step"] = torch.tensor(step, dtype=torch.float32, device=_step_device(key))


def optimizer_step_count(engine: Engine) -> float:
    """Updates that the optimizer has made (skipped steps do not count)."""
    steps = {float(state["step"]) for state in _inner_optimizer(engine).state.values() if "step" in state}
    assert len(steps) <= 1, f"parameters disagree on the number of updates: {sorted(steps)}"
    return steps.pop() if steps else 0.0


def publish_masters(engine: Engine) -> None:
    """After the float32 buffers were written: make the model's weights follow. Every rank must call."""
    zero = engine.deepspeed.optimizer
    if engine.zero_stage in (1, 2):
        zero.update_lp_params()
    elif engine.zero_stage == 3:
        for i in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def counters(engine: Engine) -> dict[str, Any]:
    """DeepSpeed's own counters and the state of a loss scaler that adapts, as plain values."""
    deepspeed_engine = engine.deepspeed
    return {
        "global_steps": deepspeed_engine.global_steps,
        "micro_steps": deepspeed_engine.micro_steps,
        "skipped_steps": deepspeed_engine.skipped_steps,
        "loss_scaler": scale_state(deepspeed_engine.optimizer),
    }


def restore_counters(engine: Engine, saved: dict[str, Any]) -> None:
    """The inverse of `counters`. A loss scaler that adapts stays as it is where the saved state has none."""
    deepspeed_engine = engine.deepspeed
    deepspeed_engine.global_steps = saved["global_steps"]
    deepspeed_engine.micro_steps = saved["global_steps"] * engine.accumulation  # of this run's accumulation
    deepspeed_engine.skipped_steps = saved["skipped_steps"]
    restore_scale(deepspeed_engine.optimizer, saved["loss_scaler"])


def layout(engine: Engine) -> dict[str, Any]:
    """How a run is spread over its cluster and cut into micro-batches, as plain values."""
    deepspeed_engine = engine.deepspeed
    halves = {"bf16": deepspeed_engine.bfloat16_enabled(), "fp16": deepspeed_engine.fp16_enabled()}
    return {
        "ranks": engine.world.size,
        "expert_parallel": engine.degree,
        "sequence_parallel": engine.sequences.degree,
        "zero_stage": engine.zero_stage,
        "precision": next((name for name, is_on in halves.items() if is_on), "fp32"),
        "accumulation": engine.accumulation,
        "micro_batch_size": deepspeed_engine.train_micro_batch_size_per_gpu(),
    }


def _inner_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The PyTorch optimizer inside DeepSpeed's."""
    return engine.deepspeed.basic_optimizer


def _step_device(key: Tensor) -> torch.device:
    return key.device  # fused AdamW keeps its count beside the parameter
