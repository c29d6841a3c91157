"""Between an engine and the store: what a run's state consists of, in pieces that any cluster shape can read."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mosaic_dist.checkpoint import Checkpoint, CheckpointError, TensorShard, save
from mosaic_dist.checkpoint.store import State
from mosaic_dist.parallel import Engine
from mosaic_dist.parallel.state import (
    buffers,
    counters,
    global_tensors,
    layout,
    make_optimizer_tensors,
    optimizer_step_count,
    optimizer_tensors,
    publish_masters,
    restore_counters,
    shards,
)

MASTER = "master"
"""Kind of the float32 weights."""
BUFFER = "buffer"
"""Kind of tensors beside the weights, such as a router's correction of each expert."""


def global_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter and buffer of the whole model."""
    parameters = {tensor.name: tensor.shape for tensor in global_tensors(engine).values()}
    return parameters | {name: tuple(buffer.shape) for name, buffer in buffers(engine).items()}


def engine_state(engine: Engine, state: dict[str, Any]) -> State:
    """The weights, optimizer states, counters and generators of this rank, and `state` (JSON values), to be saved.

    The layout goes with them for those who look at a checkpoint; loading does not ask for it. The pieces are views of
    what the engine trains; everything else is a copy.
    """
    pieces = []
    for shard in shards(engine):
        if shard.is_writer:
            master = shard.flat[shard.offset : shard.offset + shard.length]
            pieces.append(TensorShard(shard.name, MASTER, shard.start, master))
            for kind, values in optimizer_tensors(engine, shard).items():
                pieces.append(TensorShard(shard.name, kind, shard.start, values))
    if engine.world.is_main:
        pieces += [TensorShard(name, BUFFER, 0, buffer.flatten()) for name, buffer in buffers(engine).items()]
    own = {"optimizer_step": optimizer_step_count(engine), "engine": counters(engine), "layout": layout(engine)}
    return State(pieces, global_shapes(engine), copy.deepcopy(state) | own, generator_states())


def save_engine(root: Path, step: int, engine: Engine, state: dict[str, Any]) -> Path:
    """Write `engine_state` of all ranks. Every rank must call.

    Returns the checkpoint's folder. Raises on all ranks what went wrong on one.
    """
    return save(root, step, *engine_state(engine, state))


def load_engine(checkpoint: Checkpoint, engine: Engine) -> None:
    """Bring an engine of any ranks, expert-parallel degree and ZeRO stage to a checkpoint's state. All ranks call.

    Generators are restored where this rank was part of the world that wrote; further ranks keep their fresh ones.
    """
    ours = global_shapes(engine)
    if checkpoint.shapes.keys() != ours.keys():
        differing = sorted(checkpoint.shapes.keys() ^ ours.keys())
        raise CheckpointError(f"checkpoint and model have different parameters: {', '.join(differing[:5])}")
    for name, shape in ours.items():
        if tuple(checkpoint.shapes[name]) != shape:
            raise CheckpointError(f"{name} is {tuple(checkpoint.shapes[name])} in the checkpoint, {shape} in the model")
    kinds = {name: [kind for kind in checkpoint.kinds(name) if kind not in (MASTER, BUFFER)] for name in ours}
    make_optimizer_tensors(engine, kinds, checkpoint.state["optimizer_step"])
    with torch.no_grad():
        for shard in shards(engine):
            stop = shard.start + shard.length
            master = shard.flat[shard.offset : shard.offset + shard.length]
            master.copy_(checkpoint.read(shard.name, MASTER, shard.start, stop))
            for kind, values in optimizer_tensors(engine, shard).items():
                values.copy_(checkpoint.read(shard.name, kind, shard.start, stop))
        for name, buffer in buffers(engine).items():
            buffer.copy_(checkpoint.read_full(name, BUFFER))
    publish_masters(engine)
    restore_counters(engine, checkpoint.state["engine"])
    saved_generators = checkpoint.rank_state(engine.world.rank)
    if saved_generators is not None:
        restore_generators(saved_generators)


def generator_states() -> dict[str, Tensor]:
    """State of PyTorch's generators on this rank, as uint8 tensors."""
    states = {"generator.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["generator.cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Tensor]) -> None:
    """The inverse of `generator_states`."""
    torch.set_rng_state(states["generator.cpu"])
    if "generator.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["generator.cuda"])
