"""The optimizer's states in CPU memory, experts included: the training is the same.

Without a GPU both sides are one memory, but DeepSpeed takes its other way: gradients are copied out and added up there,
the optimizer steps on what lies there, and weights are copied back.
"""

import json

import pytest

from mosaic_dist.errors import UserError
from mosaic_dist.parallel import fill_config
from tests.launch import check, run_ranks
from tests.parallel.offload_ranks import LAYOUTS


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    path = tmp_path_factory.mktemp("offload") / "told.json"
    check(run_ranks("tests.parallel.forked", 1, "tests.parallel.offload_ranks", "2", str(path)))
    return json.loads(path.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same(told, layout):
    """In losses, norms, weights and moments, within the last bits of the norm that gradients are clipped by."""
    for rank in told:
        assert rank[layout]["is_told"]
        assert rank[layout]["numbers"] < 2e-6
        assert rank[layout]["held"] < 2e-6


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"zero_force_ds_cpu_optimizer": True, "zero_optimization": {"stage": 2}}, "zero_force_ds_cpu_optimizer must"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs stage 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "'nvme', .* use cpu"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "'nvme', .* use cpu"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(config, says):
    with pytest.raises(UserError, match=says):
        fill_config(config, precision="fp32", micro_batch_size=2, accumulation=1, world_size=2, max_grad_norm=1.0)
