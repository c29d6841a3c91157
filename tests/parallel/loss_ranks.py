"""Ranks of test_loss: train with all logits at once and with those of a few tokens at a time."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mosaic_dist.model import ActivationCheckpointing, Factored, Head, Loss, Tied, UnitHead, Untied
from mosaic_dist.parallel import Parallel, Precision, World, join_world, leave_world
from mosaic_dist.parallel.state import shards
from tests.parallel.mixed import BATCH, LEARNING_RATE, LENGTH, MODEL, Case, batches, make_engine, my_part

ACCUMULATION = 2
RANKS = 2
CHUNK = BATCH * LENGTH // RANKS // ACCUMULATION // 3 - 1
"""Four chunks of a rank's micro-batch, the last of them smaller."""
HEADS: dict[str, Head] = {"tied": Tied(), "linear": Untied(), "unit": UnitHead()}
LAYOUTS: dict[str, tuple[int, str, Precision]] = {
    f"{stage}/{head}/{precision}": (stage, head, precision)
    for stage, head, precision in (
        *((stage, "tied", "fp32") for stage in range(4)),
        (3, "linear", "fp32"),
        (3, "unit", "fp32"),
        (1, "tied", "bf16"),
        (3, "tied", "bf16"),
    )
}
"""ZeRO stage, head, precision; a tied table is a narrow one, so the head has a matrix of its own inside."""


def train(world: World, stage: int, head: str, precision: Precision, loss: Loss) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and norms of all steps, and this rank's final float32 weights."""
    model = replace(MODEL, head=HEADS[head], loss=loss)
    if head == "tied":
        model = replace(model, embedding=Factored(rank=8))
    parallel = Parallel(activation_checkpointing=ActivationCheckpointing(parts="full"))
    engine = make_engine(world, Case(world.size, stage, 2, ACCUMULATION, precision), model, parallel)
    mine = my_part(world)
    results = [engine.train_step(x[mine], y[mine], LEARNING_RATE) for x, y in batches()]
    weights = [shard.flat[shard.offset :][: shard.length].float().clone() for shard in shards(engine)]
    numbers = [[r.loss, r.auxiliary_loss, r.z_loss, r.grad_norm] for r in results]
    assert all(0 < z_loss < loss for loss, _, z_loss, _ in numbers)
    return torch.tensor(numbers), torch.cat(weights)


def main(output: str) -> None:
    """Write [{layout: the largest relative difference of numbers, and that of all weights}, ...] over ranks as JSON."""
    world = join_world(60)
    told = {}
    for name, layout in LAYOUTS.items():
        plain, weights = train(world, *layout, Loss(z_loss_coef=0.01))
        numbers, weights_in_chunks = train(world, *layout, Loss(z_loss_coef=0.01, chunk_tokens=CHUNK))
        told[name] = {
            "numbers": (numbers / plain - 1).abs().max().item(),
            "weights": ((weights_in_chunks - weights).norm() / weights.norm()).item(),
        }
    of_ranks: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(of_ranks, told)
    if world.is_main:
        Path(output).write_text(json.dumps(of_ranks))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
