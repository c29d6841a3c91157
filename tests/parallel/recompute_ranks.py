"""Ranks of test_recompute: the same noisy training with parts of it cut up or computed twice."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mosaic_dist.model import ActivationCheckpointing, Experts, Transformer
from mosaic_dist.model.moe.router import RouterModule
from mosaic_dist.parallel import Engine, Parallel, World, join_world, leave_world
from mosaic_dist.parallel.state import optimizer_tensors, shards
from tests.parallel.mixed import LEARNING_RATE, MODEL, Case, batches, make_engine, my_part

ACCUMULATION = 2
STAGES = (1, 3)
VARIANTS = {
    "none": Parallel(),
    "full": Parallel(activation_checkpointing=ActivationCheckpointing(parts="full")),
    "every second": Parallel(activation_checkpointing=ActivationCheckpointing(parts="full", every=2)),
    "attention": Parallel(activation_checkpointing=ActivationCheckpointing(parts="attention")),
    "ffn": Parallel(activation_checkpointing=ActivationCheckpointing(parts="ffn")),
    "moe": Parallel(activation_checkpointing=ActivationCheckpointing(parts="moe")),
    "chunks": Parallel(expert_chunks=3),
    "chunks in moe": Parallel(expert_chunks=3, activation_checkpointing=ActivationCheckpointing(parts="moe")),
    "chunks in full": Parallel(expert_chunks=3, activation_checkpointing=ActivationCheckpointing(parts="full")),
}


def noisy_model() -> Transformer:
    """The mixed model with everything in it that is drawn or decided in a forward pass."""
    first, second = MODEL.layers
    return replace(
        MODEL,
        layers=(
            replace(first, dropout=0.1, ffn=replace(first.ffn, jitter=0.1)),
            replace(
                second, dropout=0.1, ffn=replace(second.ffn, jitter=0.1, capacity_factor=1.25, drop_policy="probs")
            ),
        ),
    )


def train(world: World, stage: int, parallel: Parallel, seed: int) -> dict[str, Any]:
    """Results of all steps, and this rank's final weights and moments."""
    engine = make_engine(world, Case(world.size, stage, 2, ACCUMULATION, "fp32"), noisy_model(), parallel)
    calls = {
        "choices": count_calls(engine, RouterModule, "choose"),
        "passes": count_calls(engine, Experts, "forward"),
    }
    torch.manual_seed(seed + world.rank)
    mine = my_part(world)
    results = [engine.train_step(x[mine], y[mine], LEARNING_RATE) for x, y in batches()]
    held = {}
    for shard in shards(engine):
        state = optimizer_tensors(engine, shard) | {"weight": shard.flat[shard.offset :][: shard.length]}
        held |= {f"{shard.name} {kind}": value.clone() for kind, value in state.items()}
    return {
        "numbers": [[r.loss, r.auxiliary_loss, r.grad_norm] for r in results],
        "loads": [r.expert_load.tolist() for r in results],
        "router": [r.router for r in results],
        "held": held,
        "calls": {name: len(seen) for name, seen in calls.items()},
    }


def count_calls(engine: Engine, kind: type, method: str) -> list[None]:
    """A list that grows with each call of a method of a kind of module."""
    seen: list[None] = []

    def counting(call: Any) -> Any:
        return lambda *words: (seen.append(None), call(*words))[1]

    for module in engine.model.modules():
        if isinstance(module, kind):
            setattr(module, method, counting(getattr(module, method)))
    return seen


def differences(got: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """How far two trainings are apart: 0 is bitwise."""
    numbers = (torch.tensor(got["numbers"]) - torch.tensor(expected["numbers"])).abs().max().item()
    measures = (torch.stack(got["router"]) - torch.stack(expected["router"])).abs().max().item()
    assert got["held"].keys() == expected["held"].keys()
    held = max((got["held"][name] - value).abs().max().item() for name, value in expected["held"].items())
    same_loads = got["loads"] == expected["loads"]
    return {"numbers": max(numbers, measures), "held": held, "same_loads": same_loads, "calls": got["calls"]}


def main(output: str) -> None:
    """Write {"stage": {variant: the largest of the ranks' differences from the training without}} as JSON."""
    world = join_world(60)
    told: dict[str, Any] = {}
    for stage in STAGES:
        plain = train(world, stage, VARIANTS["none"], 0)
        found = {name: differences(train(world, stage, variant, 0), plain) for name, variant in VARIANTS.items()}
        found["another seed"] = differences(train(world, stage, VARIANTS["none"], 100), plain)
        of_ranks: list[Any] = [None] * world.size
        torch.distributed.all_gather_object(of_ranks, found)
        told[str(stage)] = of_ranks
    if world.is_main:
        Path(output).write_text(json.dumps(told))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
