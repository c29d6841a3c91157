"""Ranks of test_sequence: train every case of this many ranks that share sequences, and write the outcome."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.checkpoint.engine_state import BUFFER, MASTER, load_engine, save_engine
from mosaic_dist.parallel import World, join_world, leave_world
from tests.parallel.equality_ranks import by_kind, first_gradients, saved
from tests.parallel.mixed import LEARNING_RATE, OPTIMIZER
from tests.parallel.shared_sequences import CASES, RESUMED, STEPS, Case, batches, make_engine, my_part, questions


def train(world: World, case: Case, folder: Path) -> None:
    """Write `<folder>/<case>.safetensors`: results, gradients of the first step, final weights."""
    engine = make_engine(world, case)
    mine = my_part(engine)
    inputs, targets, documents = questions(case)
    known = engine.exact_match([(inputs[mine], targets[mine], None if documents is None else documents[mine])])
    results, first = [], {}
    for step, (inputs, targets, numbers) in enumerate(batches()):
        documents = numbers[mine] if case.documents else None
        result = engine.train_step(inputs[mine], targets[mine], LEARNING_RATE, documents)
        load = result.expert_load.sum().item()
        results.append([result.loss, result.auxiliary_loss, result.grad_norm, load, result.tokens])
        if step == 0:
            first = saved(folder / str(case), 1, engine)
    last = saved(folder / str(case), STEPS, engine)
    inputs, targets, numbers = batches()[0]
    evaluated = engine.evaluate([(inputs[mine], targets[mine], numbers[mine] if case.documents else None)])
    if world.is_main:
        kept = {
            "gradient": first_gradients(first, OPTIMIZER),
            "weight": by_kind(last, MASTER) | by_kind(last, BUFFER),
            "told": {"results": torch.tensor(results).double(), "held_out": torch.tensor([known, evaluated])},
        }
        flat = {f"{part}/{name}": value for part, values in kept.items() for name, value in values.items()}
        save_file(flat, folder / f"{case}.safetensors")


def resume(world: World, folder: Path) -> None:
    """A step in each layout of `RESUMED`, from the checkpoint of the one before, whose every bit arrives."""
    losses, path, there = [], folder, {}
    for step, (case, (inputs, targets, numbers)) in enumerate(zip(RESUMED, batches(), strict=True)):
        engine = make_engine(world, case)
        if step:
            load_engine(Checkpoint.open(path), engine)
            arrived = saved(folder / "again", step, engine)
            assert arrived.keys() == there.keys()
            assert all(torch.equal(arrived[name], there[name]) for name in there)
        mine = my_part(engine)
        losses.append(engine.train_step(inputs[mine], targets[mine], LEARNING_RATE, numbers[mine]).loss)
        path, there = save_engine(folder / "resumed", step + 1, engine, {}), saved(folder / "there", step + 1, engine)
    if world.is_main:
        save_file({"losses": torch.tensor(losses)}, folder / "resumed.safetensors")


def main(folder: str) -> None:
    """All cases of this many ranks."""
    world = join_world(60)
    for case in CASES:
        if case.ranks == world.size:
            train(world, case, Path(folder))
    if world.size == RESUMED[0].ranks:
        resume(world, Path(folder))
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
