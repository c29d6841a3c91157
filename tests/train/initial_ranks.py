"""Ranks of test_initial: engines of every layout start from a folder; their losses go to a file."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from mosaic_dist.convert.hugging_face import import_folder
from mosaic_dist.errors import UserError
from mosaic_dist.model import Transformer
from mosaic_dist.parallel import World, join_world, leave_world
from mosaic_dist.train.initial import fill, open_initial, verify_together
from tests.parallel.tiny import LEARNING_RATE, batches, make_engine, my_part
from tests.train.initial import CALM, asking

INFO = SimpleNamespace(path="data", tokenizer="none")


def first_losses(world: World, folder: str, model: Transformer, stage: int, degree: int) -> list[float]:
    """Loss before training and of the first step; tokens are those that both models know."""
    weights = open_initial(asking(folder, model), INFO, Path("none"))
    verify_together(weights, world)
    engine = make_engine(world, stage, degree, model, lambda module: fill(module, weights))
    inputs, targets = (tokens[my_part(world)] % model.vocab_size for tokens in batches()[0])
    before = engine.evaluate([(inputs, targets, None)])
    return [before, engine.train_step(inputs, targets, LEARNING_RATE).loss]


def main(folder: str, hugging_face: str, damaged: str, output: str) -> None:
    """Write {"stage/degree": losses, "hugging_face": losses, "damaged": what a rank says} as JSON."""
    world = join_world(60)
    told = {
        f"{stage}/{degree}": first_losses(world, folder, CALM, stage, degree)
        for stage, degree in itertools.product((0, 1, 2, 3), (1, 2))
    }
    told["hugging_face"] = first_losses(world, hugging_face, import_folder(hugging_face)[0], 3, 2)
    try:
        verify_together(open_initial(asking(damaged), INFO, Path("none")), world)
    except UserError as error:
        told["damaged"] = str(error)
    if world.rank == 1:  # the damaged file is in the share of rank 0
        Path(output).write_text(json.dumps(told))
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
