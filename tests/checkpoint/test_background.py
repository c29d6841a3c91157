"""Saves in the background: the same bytes as in the foreground, and no error lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mosaic_dist.checkpoint import Checkpoint, TensorShard
from mosaic_dist.checkpoint.background import HostMemory, copy_data
from mosaic_dist.checkpoint.rank_file import DTYPE_NAMES
from tests.checkpoint.background_ranks import HELD_SECONDS
from tests.checkpoint.ranks import WORLD_SIZE
from tests.checkpoint.samples import same_bits
from tests.launch import check, run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo ranks have left behind; one launch for all tests here."""
    folder = tmp_path_factory.mktemp("ranks")
    check(run_ranks("tests.checkpoint.background_ranks", WORLD_SIZE, str(folder)))
    return folder


@pytest.mark.parametrize("step", [1, 2])
def test_the_bytes_are_those_of_a_save_in_the_foreground(folder: Path, step: int) -> None:
    paths = [folder / kind / f"step_0000000{step}" for kind in ("sync", "async")]
    one, other = (Checkpoint.open(path).manifest for path in paths)
    assert one.keys() == other.keys()
    assert all(one[key] == other[key] for key in one if key != "time")
    for rank in range(WORLD_SIZE):
        sync_bytes, async_bytes = ((path / f"rank_0000{rank}.safetensors").read_bytes() for path in paths)
        assert sync_bytes == async_bytes


def test_training_goes_on_and_the_next_save_waits(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["good"]["trained"]
        assert rank["good"]["during"] == []
        assert rank["good"]["waited"] > HELD_SECONDS / 2
        assert (rank["good"]["after"], rank["good"]["failed"]) == ([1, 2], False)
        first, second = rank["good"]["stalls"]
        assert second < HELD_SECONDS < first  # the copy of the first was held back, and training waited for it


def test_a_failure_is_told_once_on_all_ranks_and_leaves_the_older_checkpoint_alone(seen: list[dict[str, Any]]) -> None:
    first, second = (rank["bad"] for rank in seen)
    assert first == second
    assert first["failed"]
    assert not first["failed again"]
    assert "step_00000002 was not saved: rank 1: OSError: [Errno 28] No space left on device" in first["disk"]
    assert "step 3 was not saved: no room in host memory" in first["memory"]
    assert "--checkpoint.asynchronous False" in first["memory"]
    assert (first["folders"], first["finished"]) == (["step_00000001"], 1)
    assert (first["at last"], first["steps"]) == ("no error", [1, 4])


def test_a_rank_that_dies_while_it_writes_is_an_error_on_the_others(folder: Path) -> None:
    died = json.loads((folder / "died.json").read_text())
    assert died["newest"] == 4
    assert died["error"] != "no error"


def test_host_memory_holds_pieces_of_every_dtype_and_is_used_again() -> None:
    def pieces(elements: int) -> list[TensorShard]:
        bits = [torch.randint(0, 2, (elements * dtype.itemsize,), dtype=torch.uint8) for dtype in DTYPE_NAMES]
        return [TensorShard("a", "b", 3, row.view(dtype)) for row, dtype in zip(bits, DTYPE_NAMES, strict=True)]

    memory, places = HostMemory(), set()
    for elements in (7, 1, 0, 5):
        given = pieces(elements)
        copies = memory.reserve(given)
        copy_data(given, copies)
        if elements:
            places.add(copies[0].data.data_ptr())
        for piece, copied in zip(given, copies, strict=True):
            assert copied[:3] == piece[:3]
            assert same_bits(copied.data, piece.data)
            assert elements == 0 or copied.data.data_ptr() != piece.data.data_ptr()
    assert len(places) == 1


def test_a_strided_piece_that_wants_a_gradient_is_copied() -> None:
    data = torch.arange(10.0).view(5, 2)[:, 1].requires_grad_()
    piece = TensorShard("a", "b", 0, data)
    (copied,) = HostMemory().reserve([piece])
    copy_data([piece], [copied])
    assert not copied.data.requires_grad
    assert copied.data.tolist() == [1.0, 3.0, 5.0, 7.0, 9.0]
