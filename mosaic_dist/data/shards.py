"""Random access to the samples of a split, from MDS shards that are checked before they are believed.

Every process reads by itself, with any number of threads: no shared memory, no process group, nothing left behind by
kill -9, and any number of jobs on one host. A missing, cut or altered shard is a UserError that names the file. Rows
are read from open files, one call each; not from maps of them, since a file that is cut while it is mapped ends the
process without a word.
"""

import functools
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mosaic_dist.data import mds
from mosaic_dist.data.answer import AnswerLoss
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.remote import RemoteDataset, fetch
from mosaic_dist.errors import UserError

OPEN_FILES = 64  # at a time; more shards than that are rarely in use, and 1,024 files is a usual limit of a process


class Samples(Protocol):
    """Rows that are read by number."""

    seq_len: int
    dtype: np.dtype
    answer_loss: AnswerLoss | None

    def __len__(self) -> int: ...

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Tokens [B, seq_len + 1] of samples given by number, in `dtype`. Several threads may read at a time."""


class _Opened:
    """A shard's file, closed when the last thread that reads from it is done."""

    def __init__(self, path: Path, descriptor: int, rows: int, row_bytes: int):
        """ValueError where the file holds other rows."""
        self.path, self.descriptor = path, descriptor
        self.first_row = mds.first_row(descriptor, rows, row_bytes)

    def __del__(self) -> None:
        os.close(self.descriptor)


class Shards:
    """Samples of one split, cut to `seq_len`, which must divide the dataset's: sample i is part i % parts of one there.

    With an `answer_loss` rows are never parted: padding alone is cut off, and a `seq_len` that cuts more is refused.
    The sizes of all files are checked here, the hash of a shard (`hashes=True`) before its first sample is read. Shards
    of a remote dataset are fetched before that, and always checked then.
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
        self.folder, self.hashes, self.dtype = info.path / split, hashes, np.dtype(info.dtype)
        self.row_bytes = (info.seq_len + 1) * self.dtype.itemsize
        self.url = f"{info.url}/{split}" if isinstance(info, RemoteDataset) else None
        self.mend = "copy the dataset again, or prepare it again"
        if self.url is not None:
            self.mend = f"remove it from the cache, and it is fetched from {self.url} again"
        self.entries = self._entries(info, split)
        for entry in self.entries:
            self._check_at_start(entry)
        self.shard_samples = np.array([entry["samples"] * self.parts for entry in self.entries], np.int64)
        self.ends = self.shard_samples.cumsum()
        self._ready: set[int] = set()
        self._turns = [threading.Lock() for _ in self.entries]
        """A shard is made ready by one thread."""
        self._opened: dict[int, _Opened] = {}  # in order of use
        self._opened_lock = threading.Lock()

    def _entries(self, info: DatasetInfo, split: str) -> list[dict[str, Any]]:
        try:
            entries = info.index(split)
            for entry in entries:
                mds.check_entry(entry, info.dtype, info.seq_len + 1)
            if not entries:
                raise ValueError("it names no shards")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.folder / mds.INDEX_NAME} does not describe shards of this dataset ({type(error).__name__}: "
                f"{error}); {self.mend}"
            ) from None
        return entries

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Tokens [B, seq_len + 1] of samples given by number, in the dataset's dtype."""
        tokens_BT = np.empty((len(samples), self.seq_len + 1), self.dtype)
        shards = np.searchsorted(self.ends, samples, side="right")
        rows, parts = np.divmod(samples - self.ends[shards] + self.shard_samples[shards], self.parts)
        offsets = rows * self.row_bytes + parts * self.seq_len * self.dtype.itemsize
        for row_T, shard, offset in zip(tokens_BT, shards.tolist(), offsets.tolist(), strict=True):
            opened = self._open(shard)
            if os.preadv(opened.descriptor, [row_T], opened.first_row + offset) != row_T.nbytes:
                raise UserError(f"shard {opened.path} was cut while it was read; {self.mend}")
        return tokens_BT

    def _open(self, shard: int) -> _Opened:
        """A shard, checked at its first use. Where many are open, the one whose last use is longest ago is let go."""
        with self._opened_lock:
            opened = self._opened.pop(shard, None)
            if opened is not None:
                self._opened[shard] = opened
                return opened
        opened = self._open_checked(shard)
        with self._opened_lock:
            self._opened[shard] = opened
            if len(self._opened) > OPEN_FILES:
                self._opened.pop(next(iter(self._opened)))
        return opened

    def _open_checked(self, shard: int) -> _Opened:
        entry = self.entries[shard]
        with self._turns[shard]:
            if shard not in self._ready:
                self._make_ready(entry)
                self._ready.add(shard)
        path = self.folder / entry["raw_data"]["basename"]
        try:
            return _Opened(path, os.open(path, os.O_RDONLY), entry["samples"], self.row_bytes)
        except OSError as error:
            raise UserError(f"shard {path} cannot be read ({error.strerror}); {self.mend}") from None
        except ValueError as error:
            raise UserError(f"shard {path} is damaged: {error}; {self.mend}") from None

    def _make_ready(self, entry: dict[str, Any]) -> None:
        """Check a shard, after fetching it if it is remote, and inflate it where only its compressed form is there."""
        raw, packed = entry["raw_data"], entry["zip_data"]
        if packed is None:
            if not self._fetch(raw) and self.hashes:
                self._check_content(raw, self._read_file(raw))
            return
        path = self.folder / raw["basename"]
        inflated = path.exists() and path.stat().st_size == raw["bytes"]
        if inflated and (not self.hashes or _matches(raw, path.read_bytes())):
            return
        self._fetch(packed)
        data = self._read_file(packed)
        self._check_content(packed, data)
        data = mds.decompress(entry["compression"], data)
        self._check_content(raw, data)
        _write_shared(path, data)

    def _fetch(self, file: dict[str, Any]) -> bool:
        """Whether a file was fetched just now, and so is as it should be."""
        if self.url is None:
            return False
        name = file["basename"]
        return fetch(f"{self.url}/{name}", self.folder / name, functools.partial(_problem, file))

    def _check_at_start(self, entry: dict[str, Any]) -> None:
        file = entry["zip_data"] or entry["raw_data"]
        if self.url is None or (self.folder / file["basename"]).exists():
            self._check_size(file)

    def _check_size(self, file: dict[str, Any]) -> None:
        path = self.folder / file["basename"]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"shard {path} cannot be read ({error.strerror}); {self.mend}") from None
        if size != file["bytes"]:
            raise UserError(f"shard {path} has {size:,} bytes, the index says {file['bytes']:,}; {self.mend}")

    def _read_file(self, file: dict[str, Any]) -> bytes:
        self._check_size(file)
        return (self.folder / file["basename"]).read_bytes()

    def _check_content(self, file: dict[str, Any], data: bytes) -> None:
        if not _matches(file, data):
            raise UserError(f"shard {self.folder / file['basename']} is damaged: its {mds.HASH} is wrong; {self.mend}")


class Joined:
    """The samples of several splits, numbered one after the other from 0. All have one length and one `answer_loss`."""

    def __init__(self, parts: Sequence[Samples]):
        self.parts, self.seq_len, self.answer_loss = parts, parts[0].seq_len, parts[0].answer_loss
        self.dtype = np.result_type(*(part.dtype for part in parts))
        self.ends = np.array([len(part) for part in parts], np.int64).cumsum()
        self.starts = self.ends - [len(part) for part in parts]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Read the given samples, [B, seq_len]."""
        tokens_BT = np.empty((len(samples), self.seq_len + 1), self.dtype)
        owners = np.searchsorted(self.ends, samples, side="right")
        for number in np.unique(owners):
            mine = owners == number
            tokens_BT[mine] = self.parts[number].read(samples[mine] - self.starts[number])
        return tokens_BT


def _problem(file: dict[str, Any], path: Path) -> str | None:
    data = path.read_bytes()
    if len(data) != file["bytes"]:
        return f"it has {len(data):,} bytes, the index says {file['bytes']:,}"
    return None if _matches(file, data) else f"it is damaged: its {mds.HASH} is wrong"


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
