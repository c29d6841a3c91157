"""Ranks x expert parallelism x ZeRO x accumulation x precision: losses, gradients and weights of one plain process."""

import math
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mosaic_dist.targets import IGNORE_INDEX
from tests.launch import check, run_ranks
from tests.parallel.mixed import (
    BATCH,
    CHOICES,
    LENGTH,
    MODEL,
    RATE,
    WIDENED,
    Case,
    Plain,
    batches,
    cases,
    model_of,
    plain_training,
)

CASES = [case for ranks in (1, 2, 4, 8) for case in cases(ranks)]
EXACT = [case for case in CASES if case.precision == "fp32"]
ROUNDED = [case for case in CASES if case.precision == "bf16"]
WEIGHT_BYTES, MOMENT_BYTES = 4, 8
"""Of an element: one float32, and two."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equality")
    check(run_ranks("tests.parallel.forked", 1, "tests.parallel.equality_ranks", "1,2,4,8", str(folder), timeout=480))
    return {case: load_file(folder / f"{case}.safetensors") for case in CASES}


plain = cache(plain_training)


def part(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}/"): value for name, value in tensors.items() if name.startswith(f"{kind}/")}


def deviation(got: Tensor, expected: Tensor) -> float:
    """Of all elements together, relative."""
    return ((got - expected).norm() / expected.norm()).item()


def assert_plain_loop(got: dict[str, Tensor], expected: Plain) -> None:
    """Numbers of all steps, the first gradient and the final weights are those of one process without DeepSpeed."""
    torch.testing.assert_close(
        got["told/results"][:, :3], torch.tensor(expected.results).double(), rtol=1e-5, atol=1e-6
    )
    gradients = part(got, "gradient")
    assert gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert deviation(gradients[name], gradient) < 1e-5, name
    for name, weight in part(got, "weight").items():
        torch.testing.assert_close(weight, expected.weights[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_float32_is_the_plain_loop(trained, case):
    """A gradient is what the optimizer saw, from its moment after the first step: clipped, of every parameter."""
    got, expected = trained[case], plain(case.ranks, case.accumulation, init=model_of(case).init)
    assert_plain_loop(got, expected)
    results, weights = got["told/results"], part(got, "weight")
    assert weights.keys() == {name for name in expected.weights if name != "head.weight"}  # which is the table
    corrections = weights["layers.0.ffn.router.expert_bias"] / RATE
    torch.testing.assert_close(corrections, expected.weights["layers.0.ffn.router.expert_bias"] / RATE)
    assert corrections.count_nonzero() > 4
    assert results[:, 3].eq(BATCH * LENGTH * CHOICES).all()  # every choice of every token is counted once


@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_bfloat16_is_one_process_but_for_rounding(trained, case):
    """A bfloat16 number is off by up to 2**-9; micro-batches, ranks and stages round other sums, ten or so in a row.

    Adam's first steps are as large for the smallest gradient, so single weights say nothing; all of them together do,
    and what they give in later steps is off by twice as much as in the first one.
    """
    got, expected = trained[case], trained[Case(1, 1, 1, 2, "bf16")]
    for step, (told, right) in enumerate(zip(got["told/results"], expected["told/results"], strict=True)):
        torch.testing.assert_close(told[:3], right[:3], rtol=2**-7 if step else 2**-8, atol=0.0)
    for name, gradient in part(expected, "gradient").items():
        assert deviation(got[f"gradient/{name}"], gradient) < 2**-6, name
    weights = [torch.cat([w.flatten() for w in part(t, "weight").values()]) for t in (got, expected)]
    assert deviation(*weights) < 2**-6


def test_the_plain_loop_learns_is_clipped_and_knows_its_layout():
    results = torch.tensor(plain(1, 1).results)
    assert results[0, 0].item() == pytest.approx(math.log(MODEL.vocab_size), rel=0.02)
    assert results[-1, 0] < results[0, 0] - 0.2
    assert results[:, 2].min() > 0.6  # twice the norm that it is clipped to
    for other in ((1, 2), (2, 1), (2, 2)):  # the balance losses depend on how the batch is cut
        assert abs(plain(*other).results[0][1] - results[0, 1].item()) > 1e-4
    widened, plainly = (plain(2, 1, init=init).weights for init in (WIDENED, MODEL.init))
    for name in ("layers.0.ffn.experts.up.weight", "layers.1.ffn.experts.up.weight", "norm.weight"):
        assert deviation(widened[name], plainly[name]) > 0.3, name
    scored = (batches()[0][1] != IGNORE_INDEX).view(4, -1).sum(1)
    assert scored.min() < scored.max() / 2  # ranks score different numbers of tokens


@pytest.mark.parametrize("case", [case for case in EXACT if case.ranks == 4], ids=str)
def test_a_rank_holds_its_share_of_weights_and_moments(trained, case):
    """Elements per rank: dense + experts / EP of weights; of each moment, with ZeRO, (dense + experts) / ranks.

    ZeRO-3 has no whole weights between steps. The ranks / EP ranks that hold the same experts / EP share their moments.
    No size here leaves a remainder.
    """
    elements = {
        name: weight.numel() for name, weight in part(trained[case], "weight").items() if "expert_bias" not in name
    }
    experts = sum(count for name, count in elements.items() if ".experts." in name)
    dense = sum(elements.values()) - experts
    assert experts > dense
    replica = dense + experts // case.degree
    weights = 0 if case.stage == 3 else replica
    moments = replica if case.stage == 0 else (dense + experts) // case.ranks
    assert trained[case]["told/held"].tolist() == [[weights * WEIGHT_BYTES, moments * MOMENT_BYTES]] * case.ranks
