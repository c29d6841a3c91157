"""A NaN or a spike on one rank leaves the weights and moments of all ranks as they were, whatever the ZeRO stage."""

import json
import math

import pytest

from tests.launch import check, run_ranks
from tests.parallel.nonfinite_ranks import LOSS_LIMIT, NAN_STEP, SPIKE_STEP
from tests.parallel.tiny import STEPS, reference


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    path = tmp_path_factory.mktemp("nonfinite") / "told.json"
    check(run_ranks("tests.parallel.nonfinite_ranks", 2, str(path)))
    return json.loads(path.read_text())


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_steps_are_as_if_they_had_not_been(told, stage, degree):
    results = told[f"{stage}/{degree}"]
    assert [step for step in range(STEPS) if results[step][2]] == [NAN_STEP, SPIKE_STEP]  # skipped
    assert [step for step in range(STEPS) if results[step][3]] == [SPIKE_STEP]  # rejected
    assert math.isnan(results[NAN_STEP][0])
    assert LOSS_LIMIT < results[SPIKE_STEP][0] < math.inf
    losses, norms, _ = reference(left_out=(NAN_STEP, SPIKE_STEP))
    good = [result for result in results if not result[2]]
    assert [loss for loss, *_ in good] == pytest.approx(losses, rel=1e-5)
    assert [norm for _, norm, *_ in good] == pytest.approx(norms, rel=1e-4)
