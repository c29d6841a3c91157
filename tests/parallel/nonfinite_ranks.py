"""Ranks of test_nonfinite: the logits of one rank turn to NaN in one step, and grow in another."""

import itertools
import json
import sys
from pathlib import Path

import torch

from mosaic_dist.parallel import join_world, leave_world
from tests.parallel.tiny import LEARNING_RATE, batches, make_engine, my_part

NAN_STEP, SPIKE_STEP = 4, 6
POISON = {NAN_STEP: torch.nan, SPIKE_STEP: 100.0}
"""What the logits are multiplied by."""
LOSS_LIMIT = 6.0


def main(output: str) -> None:
    """Write {"stage/degree": [[loss, norm, skipped, rejected], ...]} as JSON."""
    world = join_world(60)
    told = {}
    for stage, degree in itertools.product((0, 1, 2, 3), (1, 2)):
        engine = make_engine(world, stage, degree)
        poison = 1.0
        engine.model.head.register_forward_hook(lambda _m, _i, logits: logits * poison)  # noqa: B023
        results = []
        for step, (inputs, targets) in enumerate(batches()):
            poison = POISON.get(step, 1.0) if world.rank == 1 else 1.0
            mine = my_part(world)
            result = engine.train_step(inputs[mine], targets[mine], LEARNING_RATE, loss_limit=LOSS_LIMIT)
            results.append([result.loss, result.grad_norm, result.skipped, result.rejected])
        told[f"{stage}/{degree}"] = results
    if world.is_main:
        Path(output).write_text(json.dumps(told))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
