"""The 20B and 120B models on 64 to 1,024 ranks: every rank's tensors, groups and shares, without their memory."""

import math
from functools import cache
from types import SimpleNamespace

import pytest
from deepspeed.utils import groups as deepspeed_groups

from mosaic_dist.hardware import find_device
from mosaic_dist.model import GroupedLinear
from mosaic_dist.plan.layout import build_rank, make_layout, rank_groups
from mosaic_dist.plan.sizes import recipes_in
from mosaic_dist.plan.states import MASTER_BYTES, MOMENTS_BYTES, holders, padded, piece, rank_states
from mosaic_dist.spec import override
from tests.launch import ROOT

NODE_RANKS = 8
SIZES = {"gptoss_20b": (8, 8), "gptoss_120b": (16, 16), "openai_gptoss_20b": (32, 8), "openai_gptoss_120b": (128, 32)}
"""Experts of a layer, and expert-parallel ranks here."""
RANKS = (64, 1024)


@cache
def run_of(name):
    return dict(recipes_in(ROOT / "recipes"))[name]


@cache
def shapes(name, degree, rank):
    """Shape, and first expert where it holds some, of each parameter of a rank."""
    module = build_rank(run_of(name).model, degree, rank)
    stacks = {path: m.first_expert for path, m in module.named_modules() if isinstance(m, GroupedLinear)}
    return {path: (tuple(p.shape), stacks.get(path.rpartition(".")[0])) for path, p in module.named_parameters()}


@pytest.mark.parametrize("name", SIZES)
def test_every_expert_has_one_place_in_a_group_and_all_else_is_everywhere(name):
    experts, degree = SIZES[name]
    whole = shapes(name, 1, 0)
    found = {path: [] for path in whole}
    for rank in range(degree):  # a rank of another group with this number is alike
        mine = shapes(name, degree, rank)
        assert mine.keys() == whole.keys()
        for path, (shape, first) in mine.items():
            if first is None:
                assert shape == whole[path][0]
            else:
                assert shape == (experts // degree, *whole[path][0][1:])
                found[path] += range(first, first + shape[0])
    assert all(numbers in ([], list(range(experts))) for numbers in found.values())
    assert sum(bool(numbers) for numbers in found.values()) >= 3 * len(run_of(name).model.layers)
    assert shapes(name, degree, degree + 1) == shapes(name, degree, 1)


def layout_of(name, ranks, stage):
    run = override(run_of(name), {"parallel.expert_parallel": SIZES[name][1], "batch_tokens": 8192 * 1024})
    return make_layout(run, {"zero_optimization": {"stage": stage}}, find_device("h100"), ranks // 8, NODE_RANKS)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", SIZES)
def test_groups_part_the_ranks_and_lie_well_in_nodes(name, ranks):
    layout = layout_of(name, ranks, 1)
    for group_of in (layout.expert_group, layout.expert_data_group):
        of_rank = [tuple(group_of(rank)) for rank in range(ranks)]
        assert all(rank in group for rank, group in enumerate(of_rank))
        assert sorted(rank for group in set(of_rank) for rank in group) == list(range(ranks))
    for rank in range(ranks):
        assert set(layout.expert_group(rank)) & set(layout.expert_data_group(rank)) == {rank}
        nodes = {other // NODE_RANKS for other in layout.expert_group(rank)}
        assert len(layout.expert_group(rank)) in (layout.degree, len(nodes) * NODE_RANKS)
        assert len(nodes) == max(1, layout.degree // NODE_RANKS)


@pytest.mark.parametrize("stage", [1, 3])  # 2 has the shares of 1
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", SIZES)
def test_shares_add_up_to_the_whole(name, ranks, stage):
    layout = layout_of(name, ranks, stage)
    groups = rank_groups(layout.run.model, layout.run.optimizer, layout.degree)
    whole = sum(math.prod(shape) for shape, _ in shapes(name, 1, 0).values())
    held = sum(group.elements * (layout.degree if group.is_expert else 1) for group in groups)
    assert held == whole
    for group in groups:
        n = holders(layout, group)
        assert n == len(layout.expert_data_group(0) if group.is_expert else range(ranks))
        if stage == 3:
            assert all(0 <= piece(layout, group, size) * n - size < n for size in group.sizes)
        else:
            assert 0 <= padded(layout, group) - group.elements < 2 * n
            assert padded(layout, group) % n == 0
    share = whole / ranks * (MASTER_BYTES + MOMENTS_BYTES)
    assert share <= rank_states(layout, groups, ranks - 1).optimizer < share * 1.001


@pytest.mark.parametrize(("degree", "ranks"), [(8, 64), (16, 1024)])
def test_deepspeed_makes_these_groups(monkeypatch, degree, ranks):
    """DeepSpeed's own code, over processes that exist in name only."""
    made = []
    names_only = SimpleNamespace(
        is_initialized=lambda: True, get_world_size=lambda: ranks, get_rank=lambda: 0, new_group=made.append
    )
    monkeypatch.setattr(deepspeed_groups, "dist", names_only)
    monkeypatch.setattr(deepspeed_groups, "log_dist", lambda *words, **named: None)
    for table in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        monkeypatch.setattr(deepspeed_groups, table, {})
    deepspeed_groups._create_expert_and_data_parallel(degree)
    run = override(run_of("gptoss_120b"), {"parallel.expert_parallel": degree, "batch_tokens": 8192 * 1024})
    layout = make_layout(run, {"zero_optimization": {"stage": 1}}, find_device("h100"), ranks // 8, NODE_RANKS)
    expected = {
        tuple(group(rank)) for rank in range(ranks) for group in (layout.expert_group, layout.expert_data_group)
    }
    assert {tuple(group) for group in made} == expected


def test_a_stack_larger_than_deepspeeds_groups_is_a_group_of_its_own():
    run = run_of("gptoss_120b")
    groups = [group for group in rank_groups(run.model, run.optimizer, 2) if group.is_expert]
    assert {group.sizes for group in groups} == {(8 * 4096 * 9088,)}
    assert len(groups) == 3 * len(run.model.layers)


def test_parameters_that_learn_at_another_rate_are_groups_of_their_own():
    run = run_of("t4_moe")
    widened = override(run, {"model.init": {"type": "mup", "base": {"dim": 256, "layers.ffn.expert.hidden_dim": 1024}}})
    plain, split = (rank_groups(one.model, one.optimizer, 2) for one in (run, widened))
    assert len(split) > len(plain)
    assert sorted(name for group in split for name in group.names) == sorted(n for group in plain for n in group.names)
    assert sum(group.elements for group in split if group.is_expert) == sum(g.elements for g in plain if g.is_expert)
    assert all(group.elements for group in split)
