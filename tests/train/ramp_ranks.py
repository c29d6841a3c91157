"""Ranks of test_ramp: train while the batch grows, in all ZeRO stages; on one rank go on from the middle of that."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.data import Data
from mosaic_dist.optim import BatchRamp, Constant
from mosaic_dist.parallel import Engine, World, join_world, leave_world
from mosaic_dist.run_spec import Run
from mosaic_dist.train.session import begin
from mosaic_dist.train.trainer import Trainer
from tests.checkpoint.topology_ranks import save, train
from tests.parallel import tiny
from tests.parallel.equality_ranks import saved
from tests.parallel.tiny import LENGTH, MICRO, OPTIMIZER

STEPS, SAVED_STEP, VOCAB = 7, 3, 300
MODEL = replace(tiny.MODEL, vocab_size=VOCAB)
RUN = Run(
    name="ramp",
    model=MODEL,
    data=Data(workers=1),
    optimizer=OPTIMIZER,
    schedule=Constant(),
    steps=STEPS,
    batch_tokens=16 * LENGTH,
    batch_ramp=BatchRamp(start_tokens=4 * LENGTH, over_tokens=20 * LENGTH),
    micro_batch_size=MICRO,
)
LAYOUTS: dict[str, dict[str, Any]] = {f"zero{stage}": {"stage": stage} for stage in range(4)} | {
    "offloaded": {"stage": 2, "offload_optimizer": {"device": "cpu"}}
}
RESUMED = "zero2"
"""The layout that is saved in the middle of the ramp, and gone on from."""


def open_run(world: World, data: str, zero: dict[str, Any], seed: int = 0) -> tuple[Run, Engine]:
    """The run on this data, and an engine whose weights and generators start from `seed`."""
    run = Run.from_dict(RUN.to_dict() | {"data": RUN.data.to_dict() | {"path": data}})
    torch.manual_seed(seed + world.rank)
    config = run.fill_config({"zero_optimization": zero}, "fp32", world.size)
    return run, Engine(MODEL, OPTIMIZER, config, world.size, seed, world)


def write(folder: Path, name: str, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
    """`<name>.json`: notes of the steps, and where the run is; `<name>.safetensors`: its weights and moments."""
    tensors = saved(folder / name, STEPS, trainer.engine)
    if trainer.engine.world.is_main:
        told = {"rows": rows, "progress": vars(trainer.progress), "data": trainer.loader.state()}
        (folder / f"{name}.json").write_text(json.dumps(told))
        save_file(tensors, folder / f"{name}.safetensors")


def main(root: str, data: str) -> None:
    """Two ranks write a file for each layout, and for the one that went on; one rank goes on from the same."""
    world, folder = join_world(60), Path(root)
    for name, zero in LAYOUTS.items() if world.size > 1 else ():
        run, engine = open_run(world, data, zero)
        trainer = begin(run, run.data.load(), engine, None, SAVED_STEP)
        rows = train(trainer)
        if name == RESUMED:
            save(folder, trainer)
        trainer.until_step = STEPS
        write(folder, name, trainer, rows + train(trainer))
    run, engine = open_run(world, data, LAYOUTS[RESUMED], seed=100)
    trainer = begin(run, run.data.load(), engine, Checkpoint.open(folder / f"step_{SAVED_STEP:08d}"), STEPS)
    write(folder, f"resumed_{world.size}", trainer, train(trainer))
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
