"""The data file of one rank: a plain safetensors file, written and hashed in one pass, read by byte range.

The format (8 bytes of header length, a JSON header, the tensors' bytes without gaps) is simple enough to write here:
the library's own writer takes all tensors at once and leaves hashing and fsync to a second pass over the data.
The manifest keeps each tensor's place and checksum, so nothing in a data file is ever parsed at load.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from mosaic_dist.files import SteadyWriter

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
HEADER_ALIGNMENT_BYTES = 8


class Place(NamedTuple):
    """Where a tensor's bytes lie in a file, and their xxh3-128."""

    offset_bytes: int
    size_bytes: int
    checksum: str


class WrittenFile(NamedTuple):
    """A finished file: its size and xxh3-128 as a whole, and the place of each tensor by its key."""

    size_bytes: int
    checksum: str
    places: dict[str, Place]


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any shape and dtype, without a copy; writable."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> WrittenFile:
    """Write a new safetensors file and fsync it. Tensors may be on any device; one at a time is copied to the CPU.

    Raises FileExistsError if the file exists, and OSError as the disk does.
    """
    text, offsets = lay_out(tensors)
    whole, size = xxhash.xxh3_128(text), len(text)
    places = {}
    with open(path, "xb", buffering=0) as file:
        writer = SteadyWriter(file.fileno())
        writer.write(memoryview(text))
        for key, offset in offsets.items():
            data = byte_view(tensors[key].detach().cpu().contiguous())
            writer.write(data)
            whole.update(data)
            places[key] = Place(offset, len(data), xxhash.xxh3_128_hexdigest(data))
            size += len(data)
        os.fsync(file.fileno())
    return WrittenFile(size, whole.hexdigest(), places)


def lay_out(tensors: Mapping[str, Tensor], **metadata: str) -> tuple[bytes, dict[str, int]]:
    """Beginning of a safetensors file, and at which byte of the file each tensor begins, in the order they lie in.

    Of the tensors only shape and dtype are looked at.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offsets, end = {}, 0
    # Wide types first keeps every tensor aligned to its own size; the sort is stable.
    for key, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        offsets[key], end = end, end + tensor.nbytes
        place = [offsets[key], end]
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    text = len(text).to_bytes(8, "little") + text
    return text, {key: len(text) + offset for key, offset in offsets.items()}


def read_bytes(path: Path, offset_bytes: int, into: memoryview) -> int:
    """Fill `into` from a file at an offset; returns how many bytes there were."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset_bytes)
        filled = 0
        while filled < len(into) and (count := file.readinto(into[filled:])):
            filled += count
    return filled
