"""Recomputed parts and chunks of tokens change nothing but the memory, also where a pass draws noise and drops."""

import json

import pytest

from tests.launch import check, run_ranks
from tests.parallel.mixed import MODEL, STEPS
from tests.parallel.recompute_ranks import ACCUMULATION, STAGES, VARIANTS

PASSES = {
    "none": 1,
    "full": 2,
    "every second": 1.5,
    "attention": 1,
    "ffn": 2,
    "moe": 2,
    "chunks": 2 * 3,
    "chunks in moe": 3 * 3,
    "chunks in full": 3 * 3,
}
"""How often tokens pass the experts of a layer, forward and backward: "every second" means the first of two layers."""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    path = tmp_path_factory.mktemp("recompute") / "told.json"
    check(run_ranks("tests.parallel.forked", 1, "tests.parallel.recompute_ranks", "2", str(path)))
    return json.loads(path.read_text())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_numbers_are_those_without(told, stage, variant):
    """Bitwise without chunks; these sum gradients in another order."""
    limit = 1e-5 if "chunks" in variant else 0.0
    for found in (rank[variant] for rank in told[str(stage)]):
        assert found["numbers"] <= limit
        assert found["held"] <= limit
        assert found["same_loads"]
        layers = len(MODEL.layers) * ACCUMULATION * STEPS
        assert found["calls"] == {"choices": layers, "passes": layers * PASSES[variant]}  # experts are chosen once


@pytest.mark.parametrize("stage", STAGES)
def test_noise_matters(told, stage):
    for rank in told[str(stage)]:
        assert rank["another seed"]["numbers"] > 1e-3
        assert not rank["another seed"]["same_loads"]
