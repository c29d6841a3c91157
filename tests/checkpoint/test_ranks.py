import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from mosaic_dist.checkpoint import Checkpoint, CheckpointError
from tests.checkpoint.ranks import WORLD_SIZE
from tests.checkpoint.samples import SHAPES, random_tensors, same_bits


def test_what_two_ranks_wrote_reads_back_in_any_other_intervals(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder / "good" / "step_00000100")
    assert (checkpoint.world_size, checkpoint.state) == (2, {"from": 0})
    checkpoint.verify()
    chance = random.Random(5)
    for (name, kind), tensor in random_tensors().items():
        places = sorted([0, tensor.numel(), *(chance.randint(0, tensor.numel()) for _ in range(7))])
        for low, high in itertools.pairwise(places):
            assert same_bits(checkpoint.read(name, kind, low, high), tensor.reshape(-1)[low:high])
        assert same_bits(checkpoint.read_full(name, kind), tensor)
    assert checkpoint.shapes == SHAPES


def test_each_rank_finds_its_own_state(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder / "good" / "step_00000100")
    for rank in range(WORLD_SIZE):
        kept = checkpoint.rank_state(rank)
        assert kept is not None
        assert kept["generator"].tolist() == [rank] * 3
    assert checkpoint.rank_state(WORLD_SIZE) is None


def test_damage_in_the_file_of_any_rank_is_found_by_its_verifier(folder: Path) -> None:
    path = folder / "good" / "step_00000100" / "rank_00001.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        checkpoint = Checkpoint.open(path.parent)
        checkpoint.verify(0, 2)
        with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors is damaged"):
            checkpoint.verify(1, 2)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("hole", "master of 'a': elements [9, 10) of 10 come from no rank"),
        ("overlap", "master of 'a': elements [4, 5) come from rank 0 and from rank 1"),
        ("shape", "ranks disagree on the shape of 'a': (2, 5) and (10,)"),
        ("state", "rank 0: state.a: a object is not plain JSON"),
        ("bad piece", "rank 1: master of 'a': a 2-D piece at 5"),
        ("write_tensors 1", "rank 1: OSError: [Errno 28] No space left on device"),
        ("write_tensors 0", "rank 0: OSError: [Errno 28] No space left on device"),
        ("publish_directory 0", "rank 0: OSError: [Errno 28] No space left on device"),
    ],
)
def test_a_failure_on_one_rank_is_the_same_error_on_all(seen: list[dict[str, Any]], case: str, message: str) -> None:
    first, second = (rank["failures"][case] for rank in seen)
    assert first == second
    assert message in first


def test_failures_leave_the_older_checkpoint_alone(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["failures"]["folders"] == "step_00000001"
    assert [rank["failures"]["at last"] for rank in seen] == ["no error"] * 2
    assert seen[0]["steps"] == seen[1]["steps"] == [1, 2]


def test_a_rank_that_dies_is_an_error_on_the_others(folder: Path) -> None:
    died = json.loads((folder / "died.json").read_text())
    assert died["newest"] == 2
    assert died["error"] != "no error"
