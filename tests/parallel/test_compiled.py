"""Compiled blocks under ZeRO and expert parallelism: the numbers of plain ones, and their checkpoints bit for bit."""

import json

import pytest

from tests.launch import check, run_ranks
from tests.parallel.compiled_ranks import STAGES

PIECES = 5 + 1
"""Of a block with experts, one shared among them, and of a dense one, which two layers share."""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    check(run_ranks("tests.parallel.forked", 1, "tests.parallel.compiled_ranks", "2", str(folder), timeout=480))
    return json.loads((folder / "told.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_numbers_are_those_of_plain_blocks(told, stage):
    found = told[str(stage)]
    for got, expected in zip(found["compiled"], found["plain"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert found["plain"][0] != pytest.approx(found["plain"][1], rel=1e-3)  # the steps differ


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_are_exchanged(told, stage):
    assert told[str(stage)]["same"] == [True, True]


@pytest.mark.parametrize("stage", STAGES)
def test_all_is_compiled_in_the_first_step(told, stage):
    """For training and evaluation; also where ZeRO-3 gathers and frees the weights around each block."""
    first, second = told[str(stage)]["graphs"]
    assert first == second
    assert first in (2 * PIECES, 2 * PIECES + 1)  # torch 2.11 makes one more under ZeRO-3
    assert not told[str(stage)]["breaks"]
