"""Safetensors files that are written tensor by tensor: headers first, as names, shapes and dtypes are known before."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash
from torch import Tensor
from tqdm import tqdm

from mosaic_dist.checkpoint.rank_file import byte_view, lay_out
from mosaic_dist.errors import UserError
from mosaic_dist.files import SteadyWriter, checksum, write_atomic

WEIGHTS, INDEX, CHECKSUMS = "model.safetensors", "model.safetensors.index.json", "checksums.json"


HASHED_BYTES = 4 << 20  # that are hashed and written at a time, while they are in the processor's cache


class _File:
    """A safetensors file of its final size whose tensors are filled in; hashed on the way if they come in its order."""

    def __init__(self, path: Path, planned: Mapping[str, Tensor]):
        text, self.offsets = lay_out(planned, format="pt")
        self.path, self.planned = path, planned
        self.size_bytes = len(text) + sum(tensor.nbytes for tensor in planned.values())
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - open until the last tensor has come
        os.truncate(self._file.fileno(), self.size_bytes)
        self._writer, self._digest, self._hashed_bytes = SteadyWriter(self._file.fileno()), xxhash.xxh3_128(), 0
        self._append(memoryview(text))

    def write(self, name: str, tensor: Tensor) -> None:
        """Fill in a tensor. UserError if its shape or dtype is another one."""
        planned = self.planned[name]
        if (tensor.shape, tensor.dtype) != (planned.shape, planned.dtype):
            found, wanted = (f"{one.dtype} {list(one.shape)}" for one in (tensor, planned))
            raise UserError(f"{name} is {found} among the weights, {wanted} in the model")
        data = byte_view(tensor.detach().cpu().contiguous())
        self._writer.seek(self.offsets[name])
        if self.offsets[name] == self._hashed_bytes:
            self._append(data)
        else:
            self._writer.write(data)

    def _append(self, data: memoryview) -> None:
        for start in range(0, len(data), HASHED_BYTES):
            part = data[start : start + HASHED_BYTES]
            self._digest.update(part)
            self._writer.write(part)
        self._hashed_bytes += len(data)

    def close(self) -> str:
        """End writing; returns the file's xxh3-128."""
        self._file.close()
        return self._digest.hexdigest() if self._hashed_bytes == self.size_bytes else checksum(self.path)


def write_weights(
    folder: Path, planned: Iterable[tuple[str, Tensor]], tensors: Iterable[tuple[str, Tensor]], max_bytes: int
) -> dict[str, str]:
    """Files of at most `max_bytes` (or one tensor), with an index if there are several; returns their xxh3-128.

    `planned` are tensors without data (on the meta device), which tell names, shapes and dtypes, in order of files;
    `tensors` come in any order, and one is held at a time. UserError unless they are the planned ones, each once: a
    place that nobody filled would read as zeros. Whoever publishes the folder syncs the files.
    """
    files = _open_files(folder, dict(planned), max_bytes)
    missing = {name: file for file in files for name in file.planned}
    with tqdm(total=len(missing), unit=" tensors", desc="writing", disable=None) as bar:
        for name, tensor in tensors:
            if name not in missing:
                raise UserError(f"{name} came twice, or is no tensor of this model; nothing was exported")
            missing.pop(name).write(name, tensor)
            del tensor  # before the next one is read
            bar.update()
    if missing:
        raise UserError(f"the weights lack {', '.join(sorted(missing)[:5])}; nothing was exported")
    return {file.path.name: file.close() for file in files}


def _open_files(folder: Path, planned: Mapping[str, Tensor], max_bytes: int) -> list[_File]:
    """The files that hold these tensors, and their index if there are several."""
    shards: list[dict[str, Tensor]] = [{}]
    held_bytes = total_bytes = 0
    for name, tensor in planned.items():
        if shards[-1] and held_bytes + tensor.nbytes > max_bytes:
            shards.append({})
            held_bytes = 0
        shards[-1][name] = tensor
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    numbered = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = numbered if len(shards) > 1 else [WEIGHTS]
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return [_File(folder / name, shard) for name, shard in zip(names, shards, strict=True)]


def write_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """checksums.json: size and xxh3-128 of every file that is in the folder now; of `known` ones it is at hand."""
    known = known or {}
    sums = {
        file.name: {"bytes": file.stat().st_size, "xxh3_128": known.get(file.name) or checksum(file)}
        for file in sorted(folder.iterdir())
    }
    write_atomic(folder / CHECKSUMS, json.dumps(sums, indent=2) + "\n")
