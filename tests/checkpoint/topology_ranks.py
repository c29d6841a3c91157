"""Ranks of test_topology: train and save on some layouts, go on from there on all, and write down what came of it.

The first world of a size trains the sources of that size. The next one goes on from every source on the targets of its
size, with weights, generators and everything else of its own until the checkpoint is loaded.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.checkpoint.engine_state import save_engine
from mosaic_dist.data import Data
from mosaic_dist.data.stream import Batch, Loader
from mosaic_dist.model import SigmoidTopK
from mosaic_dist.optim import Optimizer
from mosaic_dist.parallel import Engine, StepResult, World, join_world, leave_world
from mosaic_dist.run_spec import Run
from mosaic_dist.spec import kinds
from mosaic_dist.train.session import begin
from mosaic_dist.train.trainer import Trainer
from tests.parallel import tiny
from tests.parallel.mixed import Case

SAVED_STEP, LAST_STEP = 4, 7
BATCH, VOCAB, EXPERTS, RATE = 24, 300, 12, 0.05  # the batch and the experts divide by 1, 2, 3 and 4
DENSE, SPARSE = tiny.MODEL.layers
MIXTURE = replace(
    SPARSE.ffn,
    experts=EXPERTS,
    router=SigmoidTopK(expert_bias_update_rate=RATE),
    aux_loss_coef=0.1,
    aux_loss_scope="sequence",  # so that losses do not depend on how the batch is cut
)
MODEL = replace(tiny.MODEL, vocab_size=VOCAB, layers=(DENSE, replace(SPARSE, ffn=MIXTURE)))
# with so large an epsilon an update is smooth in the gradient: the last bits of one near zero are not blown up
OPTIMIZERS: dict[str, Optimizer] = {
    name: kind(learning_rate=1e-2, max_grad_norm=0.5, eps=1e-5) for name, kind in kinds(Optimizer).items()
}

SOURCES = (Case(1, 0, 1, 3, "fp32"), Case(2, 2, 2, 1, "bf16"), Case(4, 3, 4, 2, "fp32"))
TARGETS = (*SOURCES, Case(3, 1, 3, 2, "bf16"), Case(4, 2, 2, 3, "fp32"), Case(4, 3, 2, 1, "fp32"))
STARTS = [("adamw", source) for source in SOURCES] + [(name, SOURCES[1]) for name in OPTIMIZERS if name != "adamw"]
"""Optimizer and layout of each training that is saved."""
# norms and biases stay whole on every rank, matrices do not
ZERO_SETTINGS = {"stage3_param_persistence_threshold": 100}


def pairs() -> list[tuple[str, Case, Case]]:
    """Optimizer, source and target of each load."""
    return [(optimizer, source, target) for optimizer, source in STARTS for target in TARGETS]


def open_run(world: World, data: str, optimizer: str, case: Case, seed: int) -> tuple[Run, Engine]:
    """The experiment as a layout runs it, and an engine whose weights and generators start from `seed`."""
    micro_batch_size = BATCH // case.ranks // case.accumulation
    run = Run(
        name="topology",
        model=MODEL,
        data=Data(path=data, workers=0),
        optimizer=OPTIMIZERS[optimizer],
        steps=LAST_STEP,
        batch_tokens=BATCH * tiny.LENGTH,
        micro_batch_size=micro_batch_size,
        precision=case.precision,
    )
    config = run.fill_config({"zero_optimization": {"stage": case.stage} | ZERO_SETTINGS}, case.precision, world.size)
    torch.manual_seed(seed + world.rank)
    return run, Engine(MODEL, run.optimizer, config, case.degree, seed, world)


class Notes:
    """A hook that keeps what each step was: its samples on all ranks, in their order, and its numbers."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.mine: list[int] = []

    def watch(self, loader: Loader) -> Iterator[Batch]:
        """The loader's batches."""
        for batch in loader:
            self.mine = batch.sample_ids
            yield batch

    def post_step(self, trainer: Trainer, result: StepResult) -> None:
        """Every rank calls."""
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, self.mine)
        numbers = {"loss": result.loss, "auxiliary_loss": result.auxiliary_loss, "grad_norm": result.grad_norm}
        counted = {"learning_rate": trainer.learning_rate, "tokens": trainer.progress.tokens}
        self.rows.append(numbers | counted | {"samples": [sample for mine in of_ranks for sample in mine]})


def train(trainer: Trainer) -> list[dict[str, Any]]:
    """Train to the end of this start; the notes of its steps."""
    notes, loader = Notes(), trainer.loader
    trainer.loader = notes.watch(loader)
    trainer.train([notes])
    trainer.loader = loader
    return notes.rows


def save(folder: Path, trainer: Trainer) -> Path:
    """A checkpoint as a run writes it."""
    state = {"progress": vars(trainer.progress), "data": trainer.loader.state()}
    return save_engine(folder, trainer.progress.step, trainer.engine, state)


def write_notes(folder: Path, world: World, rows: list[dict[str, Any]]) -> None:
    if world.is_main:
        (folder / "notes.json").write_text(json.dumps(rows))


def train_source(world: World, folder: Path, data: str, optimizer: str, source: Case) -> None:
    """All steps without a break but for the saves; notes of all of them."""
    run, engine = open_run(world, data, optimizer, source, seed=0)
    trainer = begin(run, run.data.load(), engine, None, SAVED_STEP)
    rows = train(trainer)
    save(folder, trainer)
    trainer.until_step = LAST_STEP
    rows += train(trainer)
    save(folder, trainer)
    write_notes(folder, world, rows)


def go_on(world: World, saved: Path, folder: Path, data: str, optimizer: str, target: Case) -> None:
    """Load, save at once, train the last steps, save again; notes of these steps."""
    run, engine = open_run(world, data, optimizer, target, seed=100)
    trainer = begin(run, run.data.load(), engine, Checkpoint.open(saved), LAST_STEP)
    save(folder, trainer)
    rows = train(trainer)
    save(folder, trainer)
    write_notes(folder, world, rows)


def name_of(optimizer: str, *cases: Case) -> str:
    """Folder of a training, or of one that goes on from it."""
    return "_to_".join([f"{optimizer}_{cases[0]}", *map(str, cases[1:])])


def main(root: str, data: str) -> None:
    """Train and save at several layouts; each training has a folder below `root`, with its checkpoints and
    `notes.json`.
    """
    world, folder = join_world(60), Path(root)
    starts = [start for start in STARTS if start[1].ranks == world.size]
    waiting = [start for start in starts if not (folder / name_of(*start)).exists()]
    dist.barrier()
    for start in waiting:
        train_source(world, folder / name_of(*start), data, *start)
    for optimizer, source, target in [] if waiting else pairs():
        if target.ranks == world.size:
            saved = folder / name_of(optimizer, source) / f"step_{SAVED_STEP:08d}"
            go_on(world, saved, folder / name_of(optimizer, source, target), data, optimizer, target)
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
