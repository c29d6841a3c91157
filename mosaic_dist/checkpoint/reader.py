"""Loading: any interval of any tensor, whoever wrote it, with the checksum of every byte that was touched.

Nothing here runs code from a file: the manifest is JSON with a checksum, and data files are read by byte range.
"""

import bisect
import math
from pathlib import Path
from typing import Any, Self

import torch
import xxhash
from torch import Tensor

from mosaic_dist.checkpoint.manifest import rank_file_name, read_manifest
from mosaic_dist.checkpoint.rank_file import DTYPES, byte_view, read_bytes
from mosaic_dist.checkpoint.tensor_shards import CheckpointError
from mosaic_dist.files import checksum
from mosaic_dist.spec import nearest


class Checkpoint:
    """A whole checkpoint, opened for reading. Needs no process group: each rank, or a tool, reads what it wants.

    A block of the store (at most 64 MiB) is proven by its checksum the first time a part of it is read, and taken as
    proven afterwards. No data is kept: memory is what was asked for and one block.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory = directory
        self.step: int = manifest["step"]
        self.world_size: int = manifest["world_size"]
        self.state: dict[str, Any] = manifest["state"]
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(t["shape"]) for n, t in manifest["tensors"].items()}
        self.manifest = manifest
        self._proven: set[tuple[int, int]] = set()

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Read and prove the manifest, and check that each file is there with its size.

        Data is proven when it is read, or by `verify`. Raises CheckpointError.
        """
        directory = Path(directory)
        checkpoint = cls(directory, read_manifest(directory))
        for rank, file in enumerate(checkpoint.manifest["files"]):
            path = directory / rank_file_name(rank)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
            if size != file["bytes"]:
                raise CheckpointError(f"{path} is damaged: it has {size} bytes, and {file['bytes']} were written")
        return checkpoint

    def kinds(self, tensor: str) -> tuple[str, ...]:
        """What is stored of a tensor, e.g. ("exp_avg", "exp_avg_sq", "master"). Raises CheckpointError."""
        return tuple(sorted(self._kinds(tensor)))

    def dtype(self, tensor: str, kind: str) -> torch.dtype:
        """Stored dtype of a tensor's kind. Raises CheckpointError if there is no such tensor or kind."""
        return DTYPES[self._kind(tensor, kind)["dtype"]]

    def read(self, tensor: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened tensor: 1-D [stop - start], stored dtype, CPU.

        Raises CheckpointError for a name or a range that is not there, and for damaged data, naming the file.
        """
        elements = math.prod(self.shapes.get(tensor, ()))
        dtype, blocks = self.dtype(tensor, kind), self._kind(tensor, kind)["blocks"]
        if not 0 <= start <= stop <= elements:
            raise CheckpointError(f"{self._what(tensor, kind)}: no elements [{start}, {stop}); it has {elements}")
        values = torch.empty(stop - start, dtype=dtype)
        into = byte_view(values)
        reached = start
        for i in range(bisect.bisect_right(blocks, start, key=lambda block: block[1]), len(blocks)):
            if reached == stop:
                break
            low, high = max(start, blocks[i][0]), min(stop, blocks[i][1])
            assert low == reached, f"{self._what(tensor, kind)} has a hole at {reached}, which save refuses"
            self._read_block(
                blocks[i], low, high, into[(low - start) * dtype.itemsize : (high - start) * dtype.itemsize]
            )
            reached = high
        assert reached == stop, f"{self._what(tensor, kind)} ends at {reached}, which save refuses"
        return values

    def read_full(self, tensor: str, kind: str) -> Tensor:
        """A whole tensor in its global shape; otherwise as `read`."""
        self._kind(tensor, kind)
        shape = self.shapes[tensor]
        return self.read(tensor, kind, 0, math.prod(shape)).view(shape)

    def rank_state(self, rank: int) -> dict[str, Tensor] | None:
        """What `rank` kept for itself, or None when the world that wrote this had no such rank."""
        if not 0 <= rank < self.world_size:
            return None
        kept = {}
        for name, row in self.manifest["rank_state"][rank].items():
            kept[name] = torch.empty(row["shape"], dtype=DTYPES[row["dtype"]])
            self._read_proven(rank, row["offset_bytes"], byte_view(kept[name]), row["xxh3_128"], f"rank state {name!r}")
        return kept

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Hash this rank's share of the files (rank, rank + world_size, ...) from the first byte to the last.

        Raises CheckpointError naming the first file that is not what was written.
        """
        for index in range(rank, self.world_size, world_size):
            self.verify_file(index)

    def verify_file(self, index: int) -> None:
        """Hash one rank's file. Raises CheckpointError if it is not what was written; threads may call at once."""
        path, written = self.directory / rank_file_name(index), self.manifest["files"][index]["xxh3_128"]
        try:
            found = checksum(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if found != written:
            raise CheckpointError(f"{path} is damaged: its xxh3-128 is {found}, and {written} was written")

    # --- blocks ---------------------------------------------------------------------------------------------------

    def _read_block(self, block: list[Any], low: int, high: int, into: memoryview) -> None:
        """Fill `into` with elements [low, high) of a block, proving the block if nobody has yet."""
        start, stop, rank, offset_bytes, written = block
        itemsize = len(into) // (high - low)
        what = f"elements [{start}, {stop})"
        skip_bytes = (low - start) * itemsize
        if (rank, offset_bytes) in self._proven:
            self._read_exactly(rank, offset_bytes + skip_bytes, into, what)
            return
        if (low, high) == (start, stop):
            self._read_proven(rank, offset_bytes, into, written, what)
        else:
            whole = memoryview(bytearray((stop - start) * itemsize))
            self._read_proven(rank, offset_bytes, whole, written, what)
            into[:] = whole[skip_bytes : skip_bytes + len(into)]
        self._proven.add((rank, offset_bytes))

    def _read_proven(self, rank: int, offset_bytes: int, into: memoryview, written: str, what: str) -> None:
        self._read_exactly(rank, offset_bytes, into, what)
        found = xxhash.xxh3_128_hexdigest(into)
        if found != written:
            path = self.directory / rank_file_name(rank)
            raise CheckpointError(f"{path} is damaged: {what} have xxh3-128 {found}, and {written} was written")

    def _read_exactly(self, rank: int, offset_bytes: int, into: memoryview, what: str) -> None:
        path = self.directory / rank_file_name(rank)
        try:
            count = read_bytes(path, offset_bytes, into)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if count != len(into):
            raise CheckpointError(f"{path} is damaged: {what}: {count} of {len(into)} bytes are there")

    # --- names ----------------------------------------------------------------------------------------------------

    def _kinds(self, tensor: str) -> dict[str, Any]:
        found = self.manifest["tensors"].get(tensor)
        if found is None:
            raise CheckpointError(f"{self.directory} has no tensor {tensor!r}; {nearest(tensor, list(self.shapes))}")
        kinds: dict[str, Any] = found["kinds"]
        return kinds

    def _kind(self, tensor: str, kind: str) -> Any:
        kinds = self._kinds(tensor)
        if kind not in kinds:
            raise CheckpointError(f"{self.directory} has no {kind!r} of {tensor!r}; {nearest(kind, list(kinds))}")
        return kinds[kind]

    def _what(self, tensor: str, kind: str) -> str:
        return f"{kind} of {tensor!r} in {self.directory}"
