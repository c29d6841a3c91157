"""The loss in chunks under ZeRO, experts shared out, blocks recomputed: the training is the same."""

import json

import pytest

from tests.launch import check, run_ranks
from tests.parallel.loss_ranks import LAYOUTS, RANKS

LIMITS = {"fp32": (2e-6, 2e-6), "bf16": (2.0**-7, 2.0**-5)}
"""Of losses and norms, and of all weights together. In bfloat16 gradients are summed in float32 where all logits at
once round theirs when they are made, and Adam's first steps are as large for the smallest gradient."""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    path = tmp_path_factory.mktemp("loss") / "told.json"
    check(run_ranks("tests.parallel.forked", 1, "tests.parallel.loss_ranks", str(RANKS), str(path), timeout=480))
    return json.loads(path.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_in_chunks_is_the_same(told, layout):
    """Losses, norms and weights; every head's weights are gathered by ZeRO-3 while its chunks are made."""
    _, _, precision = LAYOUTS[layout]
    numbers, weights = LIMITS[precision]
    for rank in told:
        assert rank[layout]["numbers"] < numbers
        assert rank[layout]["weights"] < weights
