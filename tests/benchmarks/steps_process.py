"""Process of test_training_step: every case in tiny, once around. Prints the results as JSON."""

import json
from typing import Any

import deepspeed

from benchmarks.training_step.cases import SIZES, Case, make_case
from benchmarks.training_step.contenders import makers
from benchmarks.training_step.entrant import Entrant
from benchmarks.training_step.measure import measure
from mosaic_dist.model import MoE
from mosaic_dist.parallel import World, join_world, leave_world
from mosaic_dist.spec import override


def tiny(recipe: str) -> Case:
    """Without a balance loss, which the peers do not have: so all of them do the same."""
    case = make_case(recipe, SIZES["tiny"][recipe])
    if not isinstance(case.run.model.layers[0].ffn, MoE):
        return case
    return case._replace(run=override(case.run, {"model.layers.ffn.aux_loss_coef": 0.0}))


def measured(case: Case, world: World) -> dict[str, Any]:
    """With all contenders in this process."""
    return measure(case, {name: Entrant(case, name, "fp32", world) for name in makers(case)}, rounds=2)


if __name__ == "__main__":
    world = join_world(60)
    deepspeed.init_distributed(dist_init_required=False)
    print(json.dumps([measured(tiny(recipe), world) for recipe in SIZES["tiny"]]))
    leave_world()
