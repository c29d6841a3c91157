"""Gradients of many micro-batches in bfloat16 are summed in float32, in every ZeRO stage, with experts and offload."""

import json

import pytest

from mosaic_dist.parallel import fill_config
from tests.launch import check, run_ranks
from tests.parallel.accumulation_ranks import LAYOUTS, RANKS

ERROR = 2**-8
"""Of the gradient: what is lost between ranks, where bfloat16 travels. Sums in bfloat16 lose 5e-3 to 6e-3 over 32
micro-batches, and more over more."""


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    path = tmp_path_factory.mktemp("accumulation") / "errors.json"
    check(run_ranks("tests.parallel.forked", 1, "tests.parallel.accumulation_ranks", str(RANKS), str(path)))
    return json.loads(path.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_the_exact_sum(errors, layout):
    assert errors[layout] < ERROR


@pytest.mark.parametrize(
    ("precision", "accumulation", "said", "expected"),
    [
        ("bf16", 4, {}, {"grad_accum_dtype": "fp32"}),
        ("bf16", 1, {}, None),
        ("fp32", 4, {}, None),
        ("bf16", 4, {"data_types": {"grad_accum_dtype": "bf16"}}, {"grad_accum_dtype": "bf16"}),
    ],
)
def test_what_deepspeed_is_told(precision, accumulation, said, expected):
    """What the file says counts."""
    config = {"zero_optimization": {"stage": 1}} | said
    filled = fill_config(
        config, precision=precision, micro_batch_size=2, accumulation=accumulation, world_size=2, max_grad_norm=1.0
    )
    assert filled.get("data_types") == expected
