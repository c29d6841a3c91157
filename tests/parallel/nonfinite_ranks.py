"""Ranks of test_nonfinite: the logits of one rank turn to NaN in one step."""

import itertools
import json
import sys
from pathlib import Path

import torch

from mosaic_dist.parallel import join_world, leave_world
from tests.parallel.tiny import LEARNING_RATE, batches, make_engine, my_part

BAD_STEP = 4


def main(output: str) -> None:
    """Write {"stage/degree": [[loss, norm, skipped], ...]} as JSON."""
    world = join_world(60)
    told = {}
    for stage, degree in itertools.product((0, 1, 2, 3), (1, 2)):
        engine = make_engine(world, stage, degree)
        poison = False
        engine.model.head.register_forward_hook(lambda _m, _i, logits: logits * torch.nan if poison else logits)  # noqa: B023
        results = []
        for step, (inputs, targets) in enumerate(batches()):
            poison = step == BAD_STEP and world.rank == 1
            mine = my_part(world)
            result = engine.train_step(inputs[mine], targets[mine], LEARNING_RATE)
            results.append([result.loss, result.grad_norm, result.skipped])
        told[f"{stage}/{degree}"] = results
    if world.is_main:
        Path(output).write_text(json.dumps(told))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
