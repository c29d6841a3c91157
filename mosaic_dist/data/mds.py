"""The MDS format of mosaicml-streaming, read without it: indexes, hashes, compression. Writing and downloads use it.

Importing `streaming` costs seconds of CPU time (it imports transformers, torchvision and cloud clients). Only
`check_compression`, `open_writer` and `download` do it, when called; a rank that reads a local dataset never does.

`StreamingDataset` itself is not used, not even map-style: its constructor keeps state in POSIX shared memory and locks
under names that all jobs of a host share and that outlive kill -9 (clean_stale_shared_memory can remove a live job's),
starts and destroys a process group, needs LOCAL_WORLD_SIZE from the launcher, hangs or ends early on a missing shard,
and never checks the hash of a local file. The shards and their index need none of that: reading them leaves nothing on
the host and knows no rank.
"""

import collections
import hashlib
import importlib
import os
from typing import Any

import numpy as np
import xxhash

from mosaic_dist.errors import UserError

COLUMN = "tokens"
HASH = "xxh3_64"
INDEX_NAME = "index.json"

HASHES = {name for name in hashlib.algorithms_guaranteed if not name.startswith("shake_")}
"""Of hashlib, which streaming can name in an index in addition to xxhash's. The length of a shake hash is not fixed."""
DECOMPRESSORS = {"br": "brotli", "bz2": "bz2", "gz": "gzip", "snappy": "snappy", "zstd": "zstandard"}
"""Module whose `decompress` undoes a compression. All come with Python, mosaicml-streaming or this package."""


def _streaming(part: str) -> Any:
    """A module of `streaming.base`. It imports torchvision, which must have been built for the torch at hand."""
    try:
        return importlib.import_module(f"streaming.base.{part}")
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mosaicml-streaming cannot be imported ({error}). Where this names torchvision, torch and torchvision are "
            "not of one build (a +cpu torch with the registry's torchvision, say): install both from the same index"
        ) from error


def check_compression(compression: str | None) -> None:
    """UserError for a compression that streaming cannot write (it knows `zstd`, `zstd:1` and others)."""
    if compression is not None and not _streaming("compression").is_compression(compression):
        raise UserError(
            f"compression {compression!r} is unknown; known: {', '.join(DECOMPRESSORS)}, with a level: zstd:1"
        )


def open_writer(folder: str, dtype: str, length: int, compression: str | None, shard_bytes: int | None) -> Any:
    """A streaming `MDSWriter` of one fixed-length column of token ids: `write({COLUMN: ids})`, then `finish()`.

    `shard_bytes` None: all in one shard.
    """
    encoding = f"ndarray:{dtype}:{length}"
    return _streaming("format").MDSWriter(
        columns={COLUMN: encoding}, out=folder, compression=compression, hashes=[HASH], size_limit=shard_bytes
    )


def check_entry(entry: dict[str, Any], dtype: str, length: int) -> None:
    """ValueError, KeyError or TypeError where an entry of an index is not of one column of `length` ids of a dtype."""
    form = (entry["version"], entry["format"], entry["column_names"], entry["column_encodings"], entry["column_sizes"])
    expected = (2, "mds", [COLUMN], [f"ndarray:{dtype}:{length}"], [length * np.dtype(dtype).itemsize])
    if form != expected:
        raise ValueError(f"(version, format, columns, encodings, sizes) are {form}, not {expected}")
    for file in (entry["raw_data"], entry["zip_data"]):
        if file is not None and (
            os.path.basename(file["basename"]) != file["basename"] or file["bytes"] < 1 or HASH not in file["hashes"]
        ):
            raise ValueError(f"a file is told as {file}")
    if entry["samples"] < 1 or entry["raw_data"] is None or (entry["zip_data"] and not entry["compression"]):
        raise ValueError(f"{entry['samples']} samples in {entry['raw_data']}, {entry['compression']!r}")


def first_row(descriptor: int, rows: int, row_bytes: int) -> int:
    """Where the rows of an MDS shard begin, all of one size: row i lies at `first_row + i * row_bytes`.

    A shard is the number of rows, where each begins and the last ends (uint32 all), a description, and the rows.
    ValueError where it holds another number of rows, or rows of other sizes.
    """
    head = np.frombuffer(os.pread(descriptor, 4 * (rows + 2), 0), np.uint32).astype(np.int64)
    if len(head) != rows + 2 or head[0] != rows or (np.diff(head[1:]) != row_bytes).any():
        raise ValueError(f"its head does not tell {rows} rows of {row_bytes} bytes")
    return int(head[1])


def download(url: str, path: str, timeout_seconds: float) -> None:
    """Bring an object to a path that does not exist yet, by streaming's downloader for the URL's scheme.

    It raises what that raises, of many libraries, and may leave parts of the file or others beside it. Only the waiting
    for an answer is bounded by the time. The settings are streaming's: S3_ENDPOINT_URL, GCS_KEY and others.
    """
    storage = _streaming("storage.download")
    scheme = url.partition("://")[0]
    if scheme != "file" and scheme not in storage.DOWNLOADER_MAPPINGS:
        known = sorted({*filter(None, storage.DOWNLOADER_MAPPINGS), "file"})
        raise UserError(f"nothing here fetches {url}: known are {', '.join(f'{name}://' for name in known)}")
    place = url.removeprefix("file://")
    try:
        downloader = _idle_downloaders[scheme].pop()
    except IndexError:
        downloader = storage.CloudDownloader.get(place)
    downloader.download(place, path, timeout_seconds)
    _idle_downloaders[scheme].append(downloader)  # not after a failure: the next attempt makes a new one


_idle_downloaders: collections.defaultdict[str, list[Any]] = collections.defaultdict(list)
"""By scheme: a client takes long to make, and one at a time uses it."""


def file_hash(algorithm: str, data: bytes) -> str:
    """Hash of a file's bytes, as an index names and writes it: hexadecimal."""
    if algorithm in xxhash.algorithms_available:
        return getattr(xxhash, algorithm)(data).hexdigest()
    if algorithm in HASHES:
        return hashlib.new(algorithm, data).hexdigest()
    known = ", ".join(sorted(HASHES | xxhash.algorithms_available))
    raise UserError(f"the index names the hash {algorithm!r}, which is unknown; known: {known}")


def decompress(compression: str, data: bytes) -> bytes:
    """Content of a compressed shard. The compression is named as in an index, with or without a level: `zstd:1`.

    Errors in the data are those of the compression's library.
    """
    family = compression.partition(":")[0]
    if family not in DECOMPRESSORS:
        raise UserError(
            f"the index names the compression {compression!r}, which is unknown; known: {', '.join(DECOMPRESSORS)}"
        )
    return importlib.import_module(DECOMPRESSORS[family]).decompress(data)
