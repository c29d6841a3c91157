"""Safetensors files that are written tensor by tensor: headers first, as names, shapes and dtypes are known before."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from mosaic_dist.checkpoint.rank_file import byte_view, lay_out
from mosaic_dist.errors import UserError
from mosaic_dist.files import checksum, write_atomic

WEIGHTS, INDEX, CHECKSUMS = "model.safetensors", "model.safetensors.index.json", "checksums.json"


class _Place(NamedTuple):
    """Where a tensor's bytes go; `planned` has its shape and dtype."""

    path: Path
    offset_bytes: int
    planned: Tensor


def write_weights(
    folder: Path, planned: Iterable[tuple[str, Tensor]], tensors: Iterable[tuple[str, Tensor]], max_bytes: int
) -> None:
    """Files of at most `max_bytes` (or one tensor), with an index if there are several.

    `planned` are tensors without data (on the meta device), which tell names, shapes and dtypes, in order of files;
    `tensors` come in any order, and one is held at a time. UserError unless they are the planned ones, each once: a
    place that nobody filled would read as zeros. Whoever publishes the folder syncs the files.
    """
    places = _write_headers(folder, dict(planned), max_bytes)
    with tqdm(total=len(places), unit=" tensors", desc="writing", disable=None) as bar:
        for name, tensor in tensors:
            if name not in places:
                raise UserError(f"{name} came twice, or is no tensor of this model; nothing was exported")
            _write(places.pop(name), name, tensor)
            del tensor  # before the next one is read
            bar.update()
    if places:
        raise UserError(f"the weights lack {', '.join(sorted(places)[:5])}; nothing was exported")


def _write(place: _Place, name: str, tensor: Tensor) -> None:
    if (tensor.shape, tensor.dtype) != (place.planned.shape, place.planned.dtype):
        found, wanted = (f"{one.dtype} {list(one.shape)}" for one in (tensor, place.planned))
        raise UserError(f"{name} is {found} among the weights, {wanted} in the model")
    with open(place.path, "r+b", buffering=0) as file:
        file.seek(place.offset_bytes)
        left = byte_view(tensor.detach().cpu().contiguous())
        while left:  # one call writes at most 2 GiB
            left = left[file.write(left) :]


def _write_headers(folder: Path, planned: Mapping[str, Tensor], max_bytes: int) -> dict[str, _Place]:
    shards: list[list[str]] = [[]]
    held_bytes = total_bytes = 0
    for name, tensor in planned.items():
        if shards[-1] and held_bytes + tensor.nbytes > max_bytes:
            shards.append([])
            held_bytes = 0
        shards[-1].append(name)
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    numbered = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = numbered if len(shards) > 1 else [WEIGHTS]
    places: dict[str, _Place] = {}
    for file, names in zip(files, shards, strict=True):
        places |= _write_header(folder / file, {name: planned[name] for name in names})
    if len(shards) > 1:
        weight_map = {name: place.path.name for name, place in sorted(places.items())}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return places


def _write_header(path: Path, planned: Mapping[str, Tensor]) -> dict[str, _Place]:
    """A file with its header and its final size, and where each tensor goes in it."""
    text, offsets = lay_out(planned, format="pt")
    with open(path, "xb") as file:
        file.write(text)
        file.flush()
        os.truncate(file.fileno(), len(text) + sum(tensor.nbytes for tensor in planned.values()))
    return {name: _Place(path, offsets[name], tensor) for name, tensor in planned.items()}


def write_checksums(folder: Path) -> None:
    """checksums.json: size and xxh3-128 of every file that is in the folder now."""
    sums = {file.name: {"bytes": file.stat().st_size, "xxh3_128": checksum(file)} for file in sorted(folder.iterdir())}
    write_atomic(folder / CHECKSUMS, json.dumps(sums, indent=2) + "\n")
