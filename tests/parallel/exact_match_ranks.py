"""Ranks of test_exact_match: engines of every layout count the right answers of the same rows."""

import itertools
import json
import sys
from pathlib import Path

from mosaic_dist.parallel import join_world, leave_world
from tests.parallel.test_exact_match import rows
from tests.parallel.tiny import make_engine


def main(output: str) -> None:
    """Write {"stage/degree": [share of all rows, share of the first batch]} as JSON."""
    world = join_world(60)
    batches = [(inputs[world.rank :: 2], targets[world.rank :: 2], None) for inputs, targets in rows()]
    told = {}
    for stage, degree in itertools.product((0, 1, 2, 3), (1, 2)):
        engine = make_engine(world, stage, degree)
        told[f"{stage}/{degree}"] = [engine.exact_match(batches), engine.exact_match(batches[:1])]
    if world.is_main:
        Path(output).write_text(json.dumps(told))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
