import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mosaic_dist.checkpoint import Checkpoint, CheckpointError, TensorShard, save, store
from mosaic_dist.checkpoint.rank_file import DTYPE_NAMES
from tests.checkpoint.samples import DTYPES, SHAPES, cut, random_tensors, same_bits, save_small


@pytest.mark.parametrize("block_bytes", [64, 1000, 64 << 20])
def test_any_interval_reads_back_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(store, "BLOCK_BYTES", block_bytes)
    tensors = random_tensors()
    checkpoint = Checkpoint.open(save_small(tmp_path, 7, seed=0))
    assert (checkpoint.step, checkpoint.world_size, checkpoint.shapes) == (7, 1, SHAPES)
    chance = random.Random(1)
    for (name, kind), tensor in tensors.items():
        assert checkpoint.kinds(name) == tuple(sorted(DTYPES))
        assert checkpoint.dtype(name, kind) == tensor.dtype
        for _ in range(10):
            start, stop = sorted(chance.randint(0, tensor.numel()) for _ in range(2))
            assert same_bits(checkpoint.read(name, kind, start, stop), tensor.reshape(-1)[start:stop])
        assert same_bits(checkpoint.read_full(name, kind), tensor)


def test_a_rank_file_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    path = save_small(tmp_path, 7)
    stored = load_file(path / "rank_00000.safetensors")
    (pieces,) = cut(random_tensors(7), 1)
    expected = {f"{p.kind}/{p.tensor}/{p.start}": p.data for p in pieces if len(p.data)}
    expected["rank_state/generator"] = torch.arange(5) + 7
    assert stored.keys() == expected.keys()
    assert all(same_bits(stored[key], value) for key, value in expected.items())


def test_every_dtype_and_strided_data(tmp_path: Path) -> None:
    pieces, shapes = [], {}
    for dtype in DTYPE_NAMES:
        bits = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * dtype.itemsize,), dtype=torch.uint8)
        every_second = torch.stack([bits.view(dtype), bits.view(dtype)], dim=1)[:, 0]
        assert not every_second.is_contiguous()
        pieces.append(TensorShard(str(dtype), "master", 0, every_second.requires_grad_(dtype.is_floating_point)))
        shapes[str(dtype)] = (3, 2)
    checkpoint = Checkpoint.open(save(tmp_path, 0, pieces, shapes, {}, {}))
    for piece in pieces:
        assert same_bits(checkpoint.read(piece.tensor, "master", 0, 6), piece.data.detach().contiguous())
        ((_, _, _, offset_bytes, _),) = checkpoint.manifest["tensors"][piece.tensor]["kinds"]["master"]["blocks"]
        assert offset_bytes % piece.data.element_size() == 0


def test_state_and_rank_state(tmp_path: Path) -> None:
    state = {"loss": 0.1 + 0.2, "best": float("inf"), "betas": [0.9, 0.95], "text": "é\n", "none": None, "big": 2**70}
    rank_state = {"generator": torch.get_rng_state(), "matrix": torch.randn(2, 3), "scalar": torch.tensor(1.5)}
    checkpoint = Checkpoint.open(save(tmp_path, 0, [], {}, state, rank_state))
    assert checkpoint.state == state
    kept = checkpoint.rank_state(0)
    assert kept is not None
    assert kept.keys() == rank_state.keys()
    assert all(same_bits(kept[name], rank_state[name]) for name in kept)
    assert checkpoint.rank_state(1) is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"groups": [{3: 1.0}]}, r"state\.groups\[0\]: the key 3 is no string"),
        ({"loss": torch.tensor(1.0)}, r"state\.loss: a Tensor is not plain JSON"),
    ],
)
def test_a_state_that_json_would_change_is_refused(tmp_path: Path, state: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 0, [], {}, state, {})


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ([(0, 4), (6, 10)], r"exp_avg of 'a': elements \[4, 6\) of 10 come from no rank"),
        ([(2, 10)], r"elements \[0, 2\) of 10 come from no rank"),
        ([(0, 7)], r"elements \[7, 10\) of 10 come from no rank"),
        ([(0, 0)], r"elements \[0, 10\) of 10 come from no rank"),
        ([(0, 6), (4, 10)], r"elements \[4, 6\) come from rank 0 and from rank 0"),
        ([(0, 10), (3, 5)], r"elements \[3, 5\) come from rank 0 and from rank 0"),
        ([(0, 10), (0, 10)], r"elements \[0, 10\) come from rank 0"),
        ([(0, 12)], r"elements \[10, 12\) of rank 0 are beyond its 10 elements"),
        ([(-1, 10)], "a 1-D piece at -1"),
        ([], r"'a' has a shape, \(2, 5\), but no piece"),
    ],
)
def test_what_does_not_tile_is_refused_before_anything_is_written(
    tmp_path: Path, intervals: list, message: str
) -> None:
    pieces = [TensorShard("a", "exp_avg", start, torch.zeros(stop - start)) for start, stop in intervals]
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "root", 0, pieces, {"a": (2, 5)}, {}, {})
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (TensorShard("b", "master", 0, torch.zeros(4)), "master of 'b' has pieces but no shape"),
        (TensorShard("a", "master", 4, torch.zeros(4, dtype=torch.float16)), "several dtypes: F16, F32"),
        (TensorShard("a", "master", 4, torch.zeros(2, 2)), "a 2-D piece at 4"),
        (TensorShard("a", "rank_state", 0, torch.zeros(4)), "cannot be a kind"),
        (TensorShard("a", "x/y", 0, torch.zeros(4)), "cannot be a kind"),
        (TensorShard("a", "x", 0, torch.zeros(4, dtype=torch.complex64)), "complex64"),
    ],
)
def test_bad_pieces_are_refused(tmp_path: Path, piece: TensorShard, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 0, [TensorShard("a", "master", 0, torch.zeros(4)), piece], {"a": (8,)}, {}, {})


def test_wrong_reads_name_what_there_is(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_small(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"no tensor 'norm\.wait'; did you mean 'norm\.weight'"):
        checkpoint.read("norm.wait", "master", 0, 1)
    with pytest.raises(CheckpointError, match=r"no 'mastr' of 'norm\.weight'; did you mean 'master'"):
        checkpoint.read_full("norm.weight", "mastr")
    with pytest.raises(CheckpointError, match=r"no elements \[90, 98\); it has 97"):
        checkpoint.read("norm.weight", "master", 90, 98)


def test_a_failed_write_leaves_only_the_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_small(tmp_path, 1)
    before = sorted(path.read_bytes() for path in (tmp_path / "step_00000001").iterdir())
    for name in ("write_tensors", "write_atomic", "publish_directory"):
        with monkeypatch.context() as patch:
            patch.setattr(store, name, _disk_full)
            for step in (1, 2):
                with pytest.raises(
                    CheckpointError, match=f"step_0000000{step} was not saved: rank 0: OSError.*No space"
                ):
                    save_small(tmp_path, step, seed=9)
                assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert sorted(path.read_bytes() for path in (tmp_path / "step_00000001").iterdir()) == before


def _disk_full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_manifest_is_json_that_a_person_can_read(tmp_path: Path) -> None:
    manifest = json.loads((save_small(tmp_path, 3) / "manifest.json").read_text())["manifest"]
    assert (manifest["format"], manifest["step"], manifest["world_size"]) == (1, 3, 1)
    assert manifest["tensors"]["norm.weight"]["shape"] == [97]
    assert manifest["versions"]["torch"] == torch.__version__
