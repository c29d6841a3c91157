"""Ranks that share sequences: losses, gradients and weights of one plain process that has them whole."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mosaic_dist.errors import UserError
from mosaic_dist.model import GQA, MHA, MQA, Attention, MoE
from mosaic_dist.parallel import check_sequence_parallel
from mosaic_dist.targets import IGNORE_INDEX
from tests.launch import check, run_ranks
from tests.parallel.shared_sequences import BATCH, CASES, LENGTH, MODELS, STEPS, TOP_K, batches, experts, plain_training
from tests.parallel.test_equality import assert_plain_loop


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence")
    words = ("tests.parallel.sequence_ranks", "2,4", str(folder))
    check(run_ranks("tests.parallel.forked", 1, *words, timeout=480))
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shared_sequences_are_whole_ones(outcome, case):
    """What is counted, too: scored tokens, choices and questions once, whoever had them."""
    got = load_file(outcome / f"{case}.safetensors")
    expected, evaluated = plain_training(case.model, case.data_ranks * case.accumulation, case.documents)
    assert_plain_loop(got, expected)
    torch.testing.assert_close(got["told/held_out"], torch.tensor([1 / 3, evaluated]))
    layers = sum(isinstance(block.ffn, MoE) for block in MODELS[case.model].layers)
    scored = torch.tensor([(targets != IGNORE_INDEX).sum() for _, targets, _ in batches()])
    counted = torch.stack([torch.full((STEPS,), BATCH * LENGTH * layers * TOP_K), scored], 1)
    torch.testing.assert_close(got["told/results"][:, 3:], counted.double())


def test_a_run_goes_on_with_other_ranks_to_a_sequence(outcome):
    """The ranks assert that every bit arrives. The balance losses see micro-batches of other sizes each time."""
    expected, _ = plain_training("rotary", 1, True)
    losses = torch.tensor([loss for loss, *_ in expected.results])
    torch.testing.assert_close(load_file(outcome / "resumed.safetensors")["losses"], losses, rtol=1e-4, atol=0.0)


GQA_8_6 = GQA(heads=24, kv_heads=6, head_dim=4)


@pytest.mark.parametrize(
    ("attention", "ranks", "node", "length", "degree", "message"),
    [
        (MHA(heads=4), 6, 6, 16, 4, r"6 ranks do not divide by sequence_parallel \(4\); use 1, 2, 3, 6"),
        (
            MHA(heads=4),
            12,
            6,
            16,
            4,
            r"sequence_parallel \(4\) would cut groups across nodes of 6 ranks; use 1, 2, 3, 6",
        ),
        (MHA(heads=4), 4, 4, 18, 4, r"18 tokens do not divide by sequence_parallel \(4\); .*use 1, 2, 3$"),
        (MHA(heads=2), 4, 4, 16, 4, r"layers\[0\].attention \('mha'\) cannot be shared .*\(4\) .*; use 1, 2$"),
        (GQA_8_6, 4, 4, 16, 4, r"\('gqa'\) cannot be shared .*; use 1, 2, 3$"),
        (Attention(), 2, 2, 16, 2, r"cannot be shared .*; use 1$"),
    ],
)
def test_what_cannot_be_shared_is_refused(attention, ranks, node, length, degree, message):
    block = replace(MODELS["gqa"].layers[0], attention=attention)
    with pytest.raises(UserError, match=message):
        check_sequence_parallel(replace(MODELS["gqa"], layers=(block,)), degree, length, ranks, node)


def test_what_is_dropped_by_all_tokens_is_refused():
    block = replace(MODELS["gqa"].layers[0], ffn=replace(experts("micro_batch"), capacity_factor=1.0))
    model = replace(MODELS["gqa"], layers=(block,))
    with pytest.raises(UserError, match=r"layers\[0\].ffn.capacity_factor is 1.0, but with sequence_parallel \(2\)"):
        check_sequence_parallel(model, 2, 16, 2, 2)
    check_sequence_parallel(model, 1, 16, 2, 2)


@pytest.mark.parametrize(("attention", "degree"), [(GQA_8_6, 3), (GQA_8_6, 12), (MQA(heads=4), 4), (MHA(heads=4), 8)])
def test_what_can_be_shared(attention, degree):
    """Key-value heads divide, or are a divisor; and never more ranks than heads."""
    model = replace(MODELS["gqa"], layers=(replace(MODELS["gqa"].layers[0], attention=attention),))
    if degree > attention.heads:
        with pytest.raises(UserError, match="cannot be shared"):
            check_sequence_parallel(model, degree, 48, degree, degree)
    else:
        check_sequence_parallel(model, degree, 48, degree, degree)
