"""Files that are written tensor by tensor are what the safetensors library reads, and never have a hole."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mosaic_dist.checkpoint.rank_file import DTYPE_NAMES
from mosaic_dist.convert.writing import write_checksums, write_weights
from mosaic_dist.errors import UserError
from mosaic_dist.files import checksum


def samples() -> dict[str, Tensor]:
    """A tensor of every dtype, a scalar, one without elements, one that is strided."""
    bits = {dtype: torch.randint(0, 2, (6 * dtype.itemsize,), dtype=torch.uint8) for dtype in DTYPE_NAMES}
    found = {f"as/{dtype}": values.view(dtype).view(2, 3) for dtype, values in bits.items()}
    return found | {"scalar": torch.tensor(1.5), "none": torch.empty(0, 4), "strided": torch.randn(5, 7).mT}


def meta(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")) for name, tensor in tensors.items()]


def test_the_library_reads_what_was_written_in_any_order(tmp_path: Path) -> None:
    tensors = samples()
    known = write_weights(tmp_path, meta(tensors), reversed(tensors.items()), 10**9)
    assert known == {"model.safetensors": checksum(tmp_path / "model.safetensors")}
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype
        assert stored[name].shape == tensor.shape
        same = tensor.contiguous().reshape(-1).view(torch.uint8) == stored[name].reshape(-1).view(torch.uint8)
        assert bool(same.all())
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers asks for it


@pytest.mark.parametrize("max_bytes", [1, 100, 160])
def test_files_are_of_bounded_size_and_in_the_index(tmp_path: Path, max_bytes: int) -> None:
    tensors = {f"t{i}": torch.full((i + 1, 4), float(i)) for i in range(6)}
    known = write_weights(tmp_path, meta(tensors), tensors.items(), max_bytes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert set(index["weight_map"].values()) == set(files)
    assert known == {file: checksum(tmp_path / file) for file in files}
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        stored = load_file(tmp_path / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == stored.keys()
        assert sum(tensor.nbytes for tensor in stored.values()) <= max_bytes or len(stored) == 1
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(), "the weights lack b"),
        (lambda t: t.append(t[0]), "a came twice"),
        (lambda t: t.append(("c", torch.ones(1))), "c came twice, or is no tensor of this model"),
        (lambda t: t.__setitem__(1, ("b", torch.ones(3))), r"b is torch.float32 \[3\] among the weights"),
        (lambda t: t.__setitem__(1, ("b", torch.ones(2).half())), r"b is torch.float16 \[2\] among the weights"),
    ],
)
def test_what_is_not_planned_is_refused(tmp_path: Path, change, message: str) -> None:
    planned = {"a": torch.ones(2, 2), "b": torch.ones(2)}
    given = list(planned.items())
    change(given)
    with pytest.raises(UserError, match=message):
        write_weights(tmp_path, meta(planned), given, 10**9)


def test_checksums_are_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1" * 1000)
    (tmp_path / "two").write_bytes(b"")
    write_checksums(tmp_path)
    sums = json.loads((tmp_path / "checksums.json").read_text())
    assert sums == {
        name: {"bytes": size, "xxh3_128": checksum(tmp_path / name)} for name, size in (("one", 1000), ("two", 0))
    }
