"""Ranks of test_nonfinite: the logits of one rank turn to NaN, or grow, in one step."""

import itertools
import json
import sys
from pathlib import Path

import torch

from mosaic_dist.parallel import join_world, leave_world
from tests.parallel.tiny import LEARNING_RATE, batches, make_engine, my_part

BAD_STEP = 4
POISONS = {"nan": torch.nan, "spike": 100.0}
"""What the logits are multiplied by."""
LOSS_LIMIT = 6.0


def main(output: str) -> None:
    """Write {"poison/stage/degree": [[loss, norm, skipped, rejected], ...]} as JSON."""
    world = join_world(60)
    told = {}
    for kind, stage, degree in itertools.product(POISONS, (0, 1, 2, 3), (1, 2)):
        engine = make_engine(world, stage, degree)
        poison = False
        engine.model.head.register_forward_hook(lambda _m, _i, logits: logits * POISONS[kind] if poison else logits)  # noqa: B023
        results = []
        for step, (inputs, targets) in enumerate(batches()):
            poison = step == BAD_STEP and world.rank == 1
            mine = my_part(world)
            result = engine.train_step(inputs[mine], targets[mine], LEARNING_RATE, loss_limit=LOSS_LIMIT)
            results.append([result.loss, result.grad_norm, result.skipped, result.rejected])
        told[f"{kind}/{stage}/{degree}"] = results
    if world.is_main:
        Path(output).write_text(json.dumps(told))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
