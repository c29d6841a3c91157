"""Ranks of test_equality and test_muon: train the mixed model in all layouts of this many ranks; the outcome."""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.checkpoint.engine_state import BUFFER, MASTER, save_engine
from mosaic_dist.parallel import Engine, join_world, leave_world
from tests.parallel.mixed import LEARNING_RATE, OPTIMIZERS, STEPS, batches, cases, make_engine, muon_cases, my_part


def saved(folder: Path, step: int, engine: Engine) -> dict[str, Tensor]:
    """Everything that a checkpoint of the engine holds, by "kind/name", through the store; empty but on rank 0."""
    path = save_engine(folder, step, engine, {})
    if not engine.world.is_main:
        return {}
    checkpoint = Checkpoint.open(path)
    found = {f"{k}/{name}": checkpoint.read_full(name, k) for name in checkpoint.shapes for k in checkpoint.kinds(name)}
    shutil.rmtree(path)
    return found


def held_bytes(engine: Engine) -> list[int]:
    """Bytes of this rank's weights (under ZeRO-3 none between steps) and of its moments."""
    state = [value for values in engine.deepspeed.basic_optimizer.state.values() for value in values.values()]
    weights, moments = list(engine.model.parameters()), [value for value in state if value.dim()]
    return [sum(tensor.nbytes for tensor in tensors) for tensors in (weights, moments)]


def first_gradients(first: dict[str, Tensor], optimizer: Any) -> dict[str, Tensor]:
    """Those that the optimizer saw in the first step, from the moments that they left."""
    moments = {"exp_avg": 1 - optimizer.beta1, "momentum_buffer": 1 - getattr(optimizer, "momentum", 0.0)}
    return {name: value / share for kind, share in moments.items() for name, value in by_kind(first, kind).items()}


def main(folder: str, optimizer: str = "adamw") -> None:
    """Write `<folder>/<case>.safetensors`: results, gradients of the first step, final weights, bytes held."""
    world = join_world(60)
    for case in cases(world.size) if optimizer == "adamw" else muon_cases(world.size):
        engine = make_engine(world, case)
        results, first = [], {}
        for step, (inputs, targets) in enumerate(batches()):
            mine = my_part(world)
            result = engine.train_step(inputs[mine], targets[mine], LEARNING_RATE)
            results.append([result.loss, result.auxiliary_loss, result.grad_norm, result.expert_load.sum().item()])
            if step == 0:
                first = saved(Path(folder) / str(case), 1, engine)
        last = saved(Path(folder) / str(case), STEPS, engine)
        held = [None] * world.size
        torch.distributed.all_gather_object(held, held_bytes(engine))
        if world.is_main:
            kept = {
                "gradient": first_gradients(first, OPTIMIZERS[optimizer]),
                "weight": by_kind(last, MASTER) | by_kind(last, BUFFER),
                "told": {"results": torch.tensor(results, dtype=torch.float64), "held": torch.tensor(held)},
            }
            flat = {f"{part}/{name}": value for part, values in kept.items() for name, value in values.items()}
            save_file(flat, Path(folder) / f"{case}.safetensors")
    leave_world()


def by_kind(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Those of one kind, by name."""
    return {name.partition("/")[2]: value for name, value in tensors.items() if name.partition("/")[0] == kind}


if __name__ == "__main__":
    main(*sys.argv[1:])
