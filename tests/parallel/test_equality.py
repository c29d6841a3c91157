"""One process, two ranks, expert parallelism, every ZeRO stage: the same losses, gradient norms and weights."""

import math

import pytest
import torch
from safetensors.torch import load_file

from tests.launch import check, run_ranks
from tests.parallel.tiny import BATCH, LENGTH, reference

LAYOUTS = [(1, z, 1) for z in range(4)] + [(2, z, e) for z in range(4) for e in (1, 2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equality")
    for ranks in (1, 2):
        check(run_ranks("tests.parallel.equality_ranks", ranks, str(folder)))
    return folder


@pytest.fixture(scope="module")
def plain():
    return reference()


@pytest.mark.parametrize(("ranks", "stage", "degree"), LAYOUTS)
def test_training_equals_one_plain_process(trained, plain, ranks, stage, degree):
    got = load_file(trained / f"w{ranks}_z{stage}_e{degree}.safetensors")
    losses, norms, weights = plain
    torch.testing.assert_close(got["results"][:, 0], torch.tensor(losses).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["results"][:, 1], torch.tensor(norms).double(), rtol=1e-5, atol=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=2e-5)  # ten Adam steps amplify the last bits
    assert got["results"][:, 2].eq(BATCH * LENGTH * 2).all()  # every choice of every token is counted once


def test_the_reference_learns_and_is_clipped(plain):
    losses, norms, _ = plain
    assert losses[0] == pytest.approx(math.log(64), rel=0.01)
    assert losses[-1] < losses[0] - 0.05
    assert max(norms) > 0.3


@pytest.mark.parametrize(("ranks", "stage", "degree"), [(2, 0, 2), (2, 1, 2), (2, 2, 2), (2, 2, 1)])
def test_a_rank_holds_its_experts_only(trained, ranks, stage, degree):
    got = load_file(trained / f"w{ranks}_z{stage}_e{degree}.safetensors")
    total = sum(tensor.numel() for name, tensor in got.items() if ".experts." in name)
    assert got["held"].item() == total // degree
