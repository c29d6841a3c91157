"""Ranks of test_accumulation: the gradient that the optimizer gets after many micro-batches in bfloat16."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mosaic_dist.parallel import Engine, World, fill_config, join_world, leave_world
from mosaic_dist.parallel.state import optimizer_tensors, shards
from tests.parallel.mixed import LENGTH, MODEL, OPTIMIZER, Case, model_of

RANKS, ACCUMULATION = 2, 32
UNCLIPPED = replace(OPTIMIZER, max_grad_norm=0.0)
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
LAYOUTS: dict[str, tuple[Case, dict[str, Any]]] = {
    f"zero {stage}, {degree} expert-parallel, {'offloaded' if offload else 'plain'}": (
        Case(RANKS, stage, degree, ACCUMULATION, "bf16"),
        offload,
    )
    for stage, degree, offload in (
        (1, 1, {}),
        (1, 2, OFFLOADED),
        (2, 1, OFFLOADED),
        (2, 2, {}),
        (3, 1, {}),
        (3, 2, {}),
        (3, 2, OFFLOADED),
    )
}
MODEL_OF_ALL = model_of(Case(RANKS, 1, 1, ACCUMULATION, "bf16"))


def batch() -> tuple[Tensor, Tensor]:
    """Inputs and targets [RANKS * ACCUMULATION, LENGTH]; all tokens are scored."""
    generator = torch.Generator().manual_seed(2)
    walk = torch.randint(0, 7, (RANKS * ACCUMULATION, LENGTH + 1), generator=generator).cumsum(-1) % MODEL.vocab_size
    return walk[:, :-1].contiguous(), walk[:, 1:].contiguous()


def exact_sum() -> dict[str, Tensor]:
    """The gradient of a batch by a plain loop: each micro-batch's in bfloat16, and their sum in float64."""
    model = MODEL_OF_ALL.build_initialized(0).bfloat16()
    inputs, targets = batch()
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for row in range(len(inputs)):
        parts = model(inputs[row : row + 1], targets[row : row + 1])
        # scaled as the engine's are, so that each is rounded alike
        (parts.cross_entropy_sum / LENGTH + parts.auxiliary).backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.double() / len(inputs)
            parameter.grad = None
    return sums


def error_of(world: World, engine: Engine, exact: dict[str, Tensor]) -> float:
    """How far the gradient of a step is from the exact sum, relative, in all elements together.

    The first moment after the first update is the gradient times 1 - beta1. A step before it is rejected: nothing of
    its gradients, which are not finite, may be left.
    """
    inputs, targets = batch()
    mine = slice(world.rank * ACCUMULATION, (world.rank + 1) * ACCUMULATION)
    few = slice(mine.start, mine.start + 2)
    rejected = engine.train_step(inputs[few], targets[few], 1e-3, loss_limit=0.1)
    assert rejected.rejected
    assert rejected.skipped
    assert not engine.train_step(inputs[mine], targets[mine], 1e-3).skipped
    squares = torch.zeros(2, dtype=torch.float64)
    for shard in shards(engine):
        if shard.is_writer:
            got = optimizer_tensors(engine, shard)["exp_avg"].double() / (1 - UNCLIPPED.beta1)
            right = exact[shard.name].flatten()[shard.start : shard.start + shard.length]
            squares += torch.stack([(got - right).square().sum(), right.square().sum()])
    torch.distributed.all_reduce(squares)
    return (squares[0] / squares[1]).sqrt().item()


def main(output: str) -> None:
    """Write {layout: error of the gradient} as JSON."""
    world, exact, errors = join_world(60), exact_sum(), {}
    for name, (case, zero) in LAYOUTS.items():
        config = fill_config(
            {"zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0} | zero},
            precision="bf16",
            micro_batch_size=1,
            accumulation=ACCUMULATION,
            world_size=world.size,
            max_grad_norm=UNCLIPPED.max_grad_norm,
        )
        engine = Engine(MODEL_OF_ALL, UNCLIPPED, config, case.degree, 0, world)
        errors[name] = error_of(world, engine, exact)
    if world.is_main:
        Path(output).write_text(json.dumps(errors))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
