"""Random access to the samples of a split, from MDS shards that are checked before they are believed.

Every process reads by itself: no shared memory, no process group, nothing left behind by kill -9, and any number of
jobs on one host. A missing, cut or altered shard is a UserError that names the file.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_dist.data import mds
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.errors import UserError

MEND = "copy the dataset again, or prepare it again"


class Shards:
    """Samples of one split, cut to `seq_len`, which must divide the dataset's: sample i is part i % parts of one there.

    With an `answer_loss` rows are never parted: padding alone is cut off, and a `seq_len` that cuts more is refused.
    The sizes of all files are checked here, the hash of a shard (`hashes=True`) before its first sample is read.
    """

    def __init__(self, info: DatasetInfo, split: str, seq_len: int | None = None, hashes: bool = True):
        self.seq_len = info.seq_len if seq_len is None else seq_len
        if info.seq_len % self.seq_len:
            raise UserError(f"seq_len ({self.seq_len}) must divide that of the dataset {info.path} ({info.seq_len})")
        self.answer_loss = info.answer_loss
        if self.answer_loss is not None and self.seq_len + 1 < self.answer_loss.row_tokens:
            raise UserError(
                f"seq_len ({self.seq_len}) cuts rows of the dataset {info.path}: the longest has "
                f"{self.answer_loss.row_tokens} tokens and needs {self.answer_loss.row_tokens - 1} or more"
            )
        self.parts = 1 if self.answer_loss is not None else info.seq_len // self.seq_len
        self.folder, self.hashes, self.dtype = info.path / split, hashes, info.dtype
        self.entries = info.index(split)
        for entry in self.entries:
            self._check_size(entry["zip_data"] or entry["raw_data"])
        self.shard_samples = np.array([entry["samples"] * self.parts for entry in self.entries], np.int64)
        self.ends = self.shard_samples.cumsum()
        # All readers now: workers that are forked later find `streaming` imported.
        self._readers = [mds.open_reader(str(self.folder), entry) for entry in self.entries]
        self._ready: set[int] = set()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Tokens [B, seq_len + 1] of samples given by number, in the dataset's dtype."""
        tokens_BT = np.empty((len(samples), self.seq_len + 1), self.dtype)
        for row_T, sample in zip(tokens_BT, samples, strict=True):
            shard = int(np.searchsorted(self.ends, sample, side="right"))
            inside, part = divmod(int(sample - self.ends[shard] + self.shard_samples[shard]), self.parts)
            row_T[:] = self._read_whole(shard, inside)[part * self.seq_len : (part + 1) * self.seq_len + 1]
        return tokens_BT

    def _read_whole(self, shard: int, inside: int) -> np.ndarray:
        if shard not in self._ready:
            self._make_ready(self.entries[shard])
            self._ready.add(shard)
        try:
            return self._readers[shard].get_item(inside)[mds.COLUMN]
        except (OSError, ValueError, IndexError) as error:
            name = self.folder / self.entries[shard]["raw_data"]["basename"]
            raise UserError(f"shard {name} changed while it was read ({error}); {MEND}") from None

    def _make_ready(self, entry: dict[str, Any]) -> None:
        """Check a shard and, where only its compressed form is there, inflate it beside that."""
        if entry["zip_data"] is None:
            if self.hashes:
                self._check_content(entry["raw_data"], self._read_file(entry["raw_data"]))
            return
        raw = self.folder / entry["raw_data"]["basename"]
        inflated = raw.exists() and raw.stat().st_size == entry["raw_data"]["bytes"]
        if inflated and (not self.hashes or _matches(entry["raw_data"], raw.read_bytes())):
            return
        packed = self._read_file(entry["zip_data"])
        self._check_content(entry["zip_data"], packed)
        data = mds.inflate(entry["compression"], packed)
        self._check_content(entry["raw_data"], data)
        _write_shared(raw, data)

    def _check_size(self, file: dict[str, Any]) -> None:
        path = self.folder / file["basename"]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"shard {path} cannot be read ({error.strerror}); {MEND}") from None
        if size != file["bytes"]:
            raise UserError(f"shard {path} has {size:,} bytes, the index says {file['bytes']:,}; {MEND}")

    def _read_file(self, file: dict[str, Any]) -> bytes:
        self._check_size(file)
        return (self.folder / file["basename"]).read_bytes()

    def _check_content(self, file: dict[str, Any], data: bytes) -> None:
        if not _matches(file, data):
            raise UserError(f"shard {self.folder / file['basename']} is damaged: its {mds.HASH} is wrong; {MEND}")


def _matches(file: dict[str, Any], data: bytes) -> bool:
    return len(data) == file["bytes"] and mds.file_hash(mds.HASH, data) == file["hashes"].get(mds.HASH)


def _write_shared(path: Path, data: bytes) -> None:
    """Write a file that other processes and hosts may be writing too, with the same content."""
    try:
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); a compressed dataset is inflated beside its shards at first "
            f"use: make room or the folder writable, or prepare the data without compression"
        ) from None
