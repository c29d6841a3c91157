"""Muon over ranks: what one plain process makes, wherever ZeRO cuts the matrices, and who works on them."""

import math
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from mosaic_dist.parallel.cut_matrices import Matrix, choose_workers, matrices_of
from mosaic_dist.parallel.partition import Partition
from tests.launch import check, run_ranks
from tests.parallel.mixed import OPTIMIZERS, muon_cases, plain_training
from tests.parallel.test_equality import assert_plain_loop, deviation, part

CASES = [case for ranks in (1, 4) for case in muon_cases(ranks)]
EXACT = [case for case in CASES if case.precision == "fp32"]
ROUNDED = [case for case in CASES if case.precision == "bf16"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("muon")
    words = ("tests.parallel.equality_ranks", "1,4", str(folder), "muon")
    check(run_ranks("tests.parallel.forked", 1, *words, timeout=300))
    return {case: load_file(folder / f"{case}.safetensors") for case in CASES}


@cache
def plain(ranks: int, accumulation: int, optimizer: str = "muon"):
    return plain_training(ranks, accumulation, OPTIMIZERS[optimizer])


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_float32_is_the_plain_loop(trained, case):
    """The iteration stretches directions that a gradient hardly has up to 500 times, and its rounding with them."""
    assert_plain_loop(trained[case], plain(case.ranks, case.accumulation))


@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_bfloat16_is_one_process_but_for_rounding(trained, case):
    """Muon on ranks equals Muon on one device; all weights together."""
    got, expected = trained[case], trained[ROUNDED[0]]
    torch.testing.assert_close(got["told/results"][:, :3], expected["told/results"][:, :3], rtol=2**-7, atol=0.0)
    for name, gradient in part(expected, "gradient").items():
        assert deviation(got[f"gradient/{name}"], gradient) < 2**-6, name
    weights = [torch.cat([w.flatten() for w in part(t, "weight").values()]) for t in (got, expected)]
    assert deviation(*weights) < 2**-6


def test_it_is_not_adamw():
    muon, adamw = plain(1, 1).weights, plain(1, 1, "adamw").weights
    assert deviation(muon["layers.0.ffn.experts.up.weight"], adamw["layers.0.ffn.experts.up.weight"]) > 0.01


SHAPES = [(4, 6), (3, 5, 2), (7, 3), (2, 2)]


def cuts(stage: int, ranks: int) -> list[Partition]:
    """Parameters of these shapes as ZeRO cuts them."""
    sizes = [math.prod(shape) for shape in SHAPES]
    shares = [math.ceil(size / ranks) for size in sizes]
    if stage == 3:
        return [Partition(shape, shares[i], 0, sum(shares[:i])) for i, shape in enumerate(SHAPES)]
    return [Partition(shape, math.ceil(sum(sizes) / ranks), sum(sizes[:i]), 0) for i, shape in enumerate(SHAPES)]


def flats(stage: int, ranks: int, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors of all ranks that hold these parameters, written from what ZeRO says it does; -1 is padding."""
    if stage < 3:
        whole = torch.cat([tensor.flatten() for tensor in tensors])
        share = math.ceil(len(whole) / ranks)
        return list(functional.pad(whole, (0, share * ranks - len(whole)), value=-1).split(share))
    pieces = []
    for tensor in tensors:
        share = math.ceil(tensor.numel() / ranks)
        padded = functional.pad(tensor.flatten(), (0, share * ranks - tensor.numel()), value=-1)
        pieces.append(padded.view(ranks, share))
    return list(torch.cat(pieces, 1))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("stage", [2, 3])
def test_places_hold_every_matrix_once(stage, ranks):
    ends = [0, *torch.tensor([math.prod(shape) for shape in SHAPES]).cumsum(0).tolist()]
    tensors = [torch.arange(a, b).view(shape) for shape, a, b in zip(SHAPES, ends[:-1], ends[1:], strict=True)]
    lying = flats(stage, ranks, tensors)
    matrices = [matrix for cut in cuts(stage, ranks) for matrix in matrices_of(cut)]
    expected = [matrix for tensor in tensors for matrix in tensor.view(-1, *tensor.shape[-2:])]
    for matrix, values in zip(matrices, expected, strict=True):
        found = torch.cat([lying[rank][place] for rank, place in matrix.places.items()])
        assert torch.equal(found.view(matrix.rows, matrix.columns), values)
    assert ranks == 1 or any(len(matrix.places) > 1 for matrix in matrices)


def test_who_holds_a_matrix_works_on_it_and_all_work_alike():
    nowhere = slice(0, 0)
    of_one = [Matrix(4, 4, {0: nowhere})] * 3
    of_all = [Matrix(4, 4, dict.fromkeys(range(4), nowhere))] * 9
    workers = choose_workers([*of_all, *of_one], 4)
    assert workers[9:] == [0, 0, 0]
    assert sorted(workers) == [rank for rank in range(4) for _ in range(3)]
