"""A NaN, or a loss above the limit, on one rank leaves the weights and moments of all ranks as they were, whatever the ZeRO stage."""

import json
import math

import pytest

from tests.launch import check, run_ranks
from tests.parallel.nonfinite_ranks import BAD_STEP, LOSS_LIMIT, POISONS
from tests.parallel.tiny import STEPS, reference


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    path = tmp_path_factory.mktemp("nonfinite") / "told.json"
    check(run_ranks("tests.parallel.nonfinite_ranks", 2, str(path)))
    return json.loads(path.read_text())


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", POISONS)
def test_the_step_is_as_if_it_had_not_been(told, kind, stage, degree):
    results = told[f"{kind}/{stage}/{degree}"]
    assert [skipped for _, _, skipped, _ in results] == [step == BAD_STEP for step in range(STEPS)]
    assert [rejected for *_, rejected in results] == [step == BAD_STEP and kind == "spike" for step in range(STEPS)]
    loss = results[BAD_STEP][0]
    assert math.isnan(loss) if kind == "nan" else LOSS_LIMIT < loss < math.inf
    losses, norms, _ = reference(left_out=BAD_STEP)
    good = results[:BAD_STEP] + results[BAD_STEP + 1 :]
    assert [loss for loss, *_ in good] == pytest.approx(losses, rel=1e-5)
    assert [norm for _, norm, *_ in good] == pytest.approx(norms, rel=1e-4)
