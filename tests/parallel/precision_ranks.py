"""The rank of test_precision: steps of the mixed model in float32 and in bfloat16, on the GPU if there is one."""

import json
import sys
from pathlib import Path

from mosaic_dist.parallel import join_world, leave_world
from tests.parallel.mixed import LEARNING_RATE, Case, batches, make_engine, model_of


def main(output: str) -> None:
    """Write the device and, by precision, loss, auxiliary loss and gradient norm of each step as JSON."""
    world = join_world(60)
    told = {"device": world.device.type}
    for precision in ("fp32", "bf16"):
        case = Case(1, 1, 1, 2, precision)
        engine = make_engine(world, case, model_of(case._replace(precision="bf16")))
        results = [engine.train_step(inputs, targets, LEARNING_RATE) for inputs, targets in batches()]
        told[precision] = [[result.loss, result.auxiliary_loss, result.grad_norm] for result in results]
    Path(output).write_text(json.dumps(told))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
