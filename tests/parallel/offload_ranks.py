"""Ranks of test_offload: train with the optimizer's states on the GPU's side and on the CPU's."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from mosaic_dist.parallel import Engine, World, join_world, leave_world
from mosaic_dist.parallel.state import optimizer_tensors, shards
from tests.parallel.mixed import LEARNING_RATE, Case, batches, make_engine, my_part

OPTIMIZER = {"offload_optimizer": {"device": "cpu"}}
CASES = [
    *(Case(2, stage, *layout) for stage in (1, 2, 3) for layout in ((1, 2, "fp32"), (2, 2, "fp32"), (2, 2, "bf16"))),
    *(Case(2, stage, 2, 2, "fp32", "muon") for stage in (2, 3)),
]
LAYOUTS: dict[str, tuple[Case, dict[str, Any]]] = {str(case): (case, OPTIMIZER) for case in CASES} | {
    "weights": (Case(2, 3, 2, 2, "fp32"), OPTIMIZER | {"offload_param": {"device": "cpu"}})
}
"""What is trained, and what ZeRO is told."""


def train(world: World, engine: Engine) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Losses and norms of all steps, and this rank's final masters and moments."""
    mine = my_part(world)
    results = [engine.train_step(x[mine], y[mine], LEARNING_RATE) for x, y in batches()]
    held = {}
    for shard in shards(engine):
        state = optimizer_tensors(engine, shard) | {"master": shard.flat[shard.offset :][: shard.length]}
        held |= {f"{shard.name} {kind}": value.clone() for kind, value in state.items()}
    return [[r.loss, r.grad_norm] for r in results], held


def main(output: str) -> None:
    """Write [{layout: the largest differences}, ...] over ranks as JSON."""
    world = join_world(60)
    told = {}
    for name, (case, zero) in LAYOUTS.items():
        plain, held = train(world, make_engine(world, case))
        engine = make_engine(world, case, **zero)
        offloaded, held_offloaded = train(world, engine)
        assert held.keys() == held_offloaded.keys()
        told[name] = {
            "numbers": (torch.tensor(plain) - torch.tensor(offloaded)).abs().max().item(),
            "held": max((held[key] - held_offloaded[key]).abs().max().item() for key in held),
            "is_told": engine.deepspeed.zero_use_cpu_optimizer(),
        }
    of_ranks: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(of_ranks, told)
    if world.is_main:
        Path(output).write_text(json.dumps(of_ranks))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
