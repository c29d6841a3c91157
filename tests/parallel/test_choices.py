"""What is decided before any rank starts: expert-parallel degree, precision, the DeepSpeed config."""

import json
from pathlib import Path

import pytest

from mosaic_dist.errors import UserError
from mosaic_dist.parallel import choose_degree, fill_config, read_config, resolve_precision

CONFIGS = sorted((Path(__file__).parent.parent.parent / "ds_configs").glob("*.json"))
OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def fill(config: dict, **changes) -> dict:
    values = {"precision": "fp32", "micro_batch_size": 2, "accumulation": 3, "world_size": 4, "max_grad_norm": 1.0}
    return fill_config(config, **(values | changes))


@pytest.mark.parametrize(
    ("asked", "experts", "world", "local", "degree"),
    [
        ("auto", [8, 8], 8, 8, 8),
        ("auto", [8, 12], 8, 8, 4),
        ("auto", [8], 16, 4, 4),
        ("auto", [8], 6, 6, 2),
        ("auto", [7], 8, 8, 1),
        ("auto", [], 8, 8, 1),
        (4, [8], 8, 2, 4),
        (1, [], 8, 8, 1),
    ],
)
def test_degree(asked, experts, world, local, degree):
    assert choose_degree(asked, experts, world, local) == degree


@pytest.mark.parametrize(
    ("asked", "experts", "world", "says"),
    [
        (3, [8], 3, r"8 experts do not divide by expert_parallel \(3\); use 1, 2, 4, 8"),
        (4, [8], 6, r"6 ranks do not divide by expert_parallel \(4\); use 1, 2, 3, 6"),
        (2, [], 2, "the model has no experts"),
    ],
)
def test_degrees_that_cannot_be(asked, experts, world, says):
    with pytest.raises(UserError, match=says):
        choose_degree(asked, experts, world, world)


def test_expert_groups_lie_inside_nodes_or_are_made_of_whole_ones():
    assert choose_degree("auto", [12], 24, 8) == 4  # 6 and 12 divide ranks and experts, but 6 would straddle nodes
    assert choose_degree(16, [16], 32, 8) == 16
    with pytest.raises(UserError, match=r"expert_parallel \(6\) would cut .* nodes of 8 ranks; use 1, 2, 4, 8, or a"):
        choose_degree(6, [12], 24, 8)


def test_our_configs_hold_what_deepspeed_alone_knows():
    assert {f"zero{stage}" for stage in range(4)} < {path.stem for path in CONFIGS}
    for path in CONFIGS:
        config = read_config(str(path))
        assert path.stem.startswith(f"zero{config['zero_optimization']['stage']}")
        for key, value in config.items():
            assert key not in OWNED or value == "auto"
        assert resolve_precision("auto", config) == "fp32"  # on a machine without a GPU
        filled = fill(config)
        assert filled["train_batch_size"] == 24
        assert "auto" not in json.dumps(filled)


def test_clipping_without_zero_is_ours():
    assert fill({"zero_optimization": {"stage": 0}})["gradient_clipping"] == 0.0
    assert fill({"zero_optimization": {"stage": 1}})["gradient_clipping"] == 1.0


def test_equal_values_are_accepted_and_others_refused():
    assert fill({"train_batch_size": 24})["train_batch_size"] == 24
    for config, says in (
        ({"train_batch_size": 25}, "train_batch_size is 25 in the DeepSpeed config, but the run says 24"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 in the DeepSpeed config, but the run says 1.0"),
        ({"scheduler": {"type": "WarmupLR"}}, "has a section 'scheduler'"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients must be False"),
        ({"zero_optimization": {"stage": 2, "reduce_scatter": False}}, "reduce_scatter must be True"),
    ):
        with pytest.raises(UserError, match=says):
            fill(config)


def test_precision():
    stage1 = {"zero_optimization": {"stage": 1}}
    assert resolve_precision("bf16", stage1) == "bf16"
    assert resolve_precision("auto", stage1 | {"bf16": {"enabled": True}}) == "bf16"
    for asked, config, says in (
        ("fp32", stage1 | {"bf16": {"enabled": True}}, "bf16.enabled is True in the DeepSpeed config, but .* 'fp32'"),
        ("bf16", stage1 | {"bf16": {"enabled": False}}, "bf16.enabled is False"),
        ("bf16", {}, "ZeRO stage 0 would train wrongly"),
        ("auto", stage1 | {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16"),
    ):
        with pytest.raises(UserError, match=says):
            resolve_precision(asked, config)


def test_files_that_are_no_config(tmp_path):
    path = tmp_path / "c.json"
    for content, says in (
        ("{", r"c\.json:1: not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"zero_optimization": {"stage": 4}}', "stage is 4"),
        ('{"gradient_cliping": 1}', "did you mean 'gradient_clipping'"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=says):
            read_config(str(path))
