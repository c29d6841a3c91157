"""Ranks of test_compiled: plain and compiled engines that take each other's checkpoints, under ZeRO 1 and 3."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.checkpoint.engine_state import load_engine, save_engine
from mosaic_dist.model import SwiGLU, compile_layers
from mosaic_dist.parallel import Engine, Parallel, World, engine, join_world, leave_world
from tests.parallel.mixed import LEARNING_RATE, MODEL, Case, batches, make_engine, my_part, replace

STAGES = (1, 3)
DENSE, SPARSE = replace(MODEL.layers[0], ffn=SwiGLU(hidden_dim=32)), MODEL.layers[0]
MIXED = replace(MODEL, layers=(SPARSE, DENSE, DENSE))


def step(world: World, trained: Engine, number: int) -> list[float]:
    """Train and evaluate on a batch; losses and gradient norm."""
    inputs, targets = (tensor[my_part(world)] for tensor in batches()[number])
    result = trained.train_step(inputs, targets, LEARNING_RATE)
    return [result.loss, result.auxiliary_loss, result.grad_norm, trained.evaluate([(inputs, targets, None)])]


def keeps(trained: Engine, path: Path, folder: Path) -> bool:
    """Whether an engine that loads a checkpoint saves the same names and bits; told by rank 0."""
    load_engine(Checkpoint.open(path), trained)
    again = save_engine(folder, 1, trained, {})
    if not trained.world.is_main:
        return True
    one, other = Checkpoint.open(path), Checkpoint.open(again)
    return list(one.shapes) == list(other.shapes) and all(
        torch.equal(one.read_full(name, kind), other.read_full(name, kind))
        for name in one.shapes
        for kind in one.kinds(name)
    )


def exchanged(world: World, stage: int, folder: Path) -> dict[str, Any]:
    """Numbers of both engines' first steps, and of second steps from the other's checkpoint."""
    case = Case(world.size, stage, world.size, 1, "fp32")
    make = functools.partial(make_engine, world, case, MIXED)
    plain = make()
    first = step(world, plain, 0)
    saved = save_engine(folder / "plain", 1, plain, {})
    torch._dynamo.reset()  # else a stage would take over what the last one compiled
    counters.clear()
    compiled = make(Parallel(compile=True))
    first_compiled = step(world, compiled, 0)
    graphs = counters["stats"]["unique_graphs"]
    saved_compiled = save_engine(folder / "compiled", 1, compiled, {})
    same = [keeps(compiled, saved, folder / "into compiled")]
    second_compiled = step(world, compiled, 1)
    told = {"graphs": [graphs, counters["stats"]["unique_graphs"]], "breaks": dict(counters["graph_break"])}
    other = make()
    same.append(keeps(other, saved_compiled, folder / "into plain"))
    plain_numbers, compiled_numbers = [first, step(world, other, 1)], [first_compiled, second_compiled]
    return told | {"plain": plain_numbers, "compiled": compiled_numbers, "same": same}


def main(folder: str) -> None:
    """Write what each stage tells as `<folder>/told.json`."""
    world = join_world(200)
    # what is asked here is how compiled blocks and DeepSpeed get on, not what code is made of them
    engine.compile_layers = functools.partial(compile_layers, backend="aot_eager")
    told = {stage: exchanged(world, stage, Path(folder) / str(stage)) for stage in STAGES}
    if world.is_main:
        (Path(folder) / "told.json").write_text(json.dumps(told))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
