"""The parts of mosaicml-streaming that are used: the MDS format, the shuffle, downloads. Nothing else imports it.

Importing `streaming` takes several seconds (it pulls in transformers, torchvision and cloud clients), so the functions
do it when called, and a `--help` or a tokenising worker never pays for it. What reading needs is taken by itself.

`StreamingDataset` itself is not used, not even map-style: its constructor keeps state in POSIX shared memory and locks
under names that all jobs of a host share and that outlive kill -9 (clean_stale_shared_memory can remove a live job's),
starts and destroys a process group, needs LOCAL_WORLD_SIZE from the launcher, hangs or ends early on a missing shard,
and never checks the hash of a local file. The shards, the index and the shuffle below it need none of that: reading
them leaves nothing on the host and knows no rank.
"""

import collections
import functools
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import numpy as np

from mosaic_dist.errors import UserError

PACKAGE = "streaming"
COLUMN = "tokens"
HASH = "xxh3_64"
INDEX_NAME = "index.json"


def _streaming(part: str) -> Any:
    """A module of `streaming.base`. It imports torchvision, which must have been built for the torch at hand."""
    try:
        return importlib.import_module(f"streaming.base.{part}")
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mosaicml-streaming cannot be imported ({error}). Where this names torchvision, torch and torchvision are "
            "not of one build (a +cpu torch with the registry's torchvision, say): install both from the same index"
        ) from error


@functools.cache
def _light(part: str) -> Any:
    """A module of `streaming.base` that needs no other part of it, without what its packages import: 2 s of each rank.

    The packages are there by name only while it is imported; whoever imports `streaming` later gets the whole.
    """
    whole = [name for name in sys.modules if name.partition(".")[0] == PACKAGE]
    if whole or (found := importlib.util.find_spec(PACKAGE)) is None:
        return _streaming(part)
    package, base = (importlib.util.module_from_spec(spec) for spec in (found, _base_of(found)))
    try:
        sys.modules |= {package.__name__: package, base.__name__: base}
        return importlib.import_module(f"{base.__name__}.{part}")
    except ImportError:  # of a version where it does need another part
        _forget()
        return _streaming(part)
    finally:
        if sys.modules.get(PACKAGE) is package:
            _forget()


def _base_of(package: ModuleSpec) -> ModuleSpec:
    found = PathFinder.find_spec(f"{PACKAGE}.base", package.submodule_search_locations)
    assert found is not None, f"{PACKAGE} has a package `base`"
    return found


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def check_compression(compression: str | None) -> None:
    """UserError for a compression that streaming cannot write (it knows `zstd`, `zstd:1` and others)."""
    codecs = _light("compression")
    if compression is not None and not codecs.is_compression(compression):
        families = sorted({name.partition(":")[0] for name in codecs.get_compressions()})
        raise UserError(f"compression {compression!r} is unknown; known: {', '.join(families)}, with a level: zstd:1")


def open_writer(folder: str, dtype: str, length: int, compression: str | None, shard_bytes: int | None) -> Any:
    """A streaming `MDSWriter` of one fixed-length column of token ids: `write({COLUMN: ids})`, then `finish()`.

    `shard_bytes` None: all in one shard.
    """
    encoding = f"ndarray:{dtype}:{length}"
    return _streaming("format").MDSWriter(
        columns={COLUMN: encoding}, out=folder, compression=compression, hashes=[HASH], size_limit=shard_bytes
    )


def import_for_reading() -> None:
    """Import what the functions below need: at the start, not within a step, and by one thread."""
    for part in ("compression", "hashing", "shuffle"):
        _light(part)


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
    """Hash of a file's bytes, as streaming writes it into the index."""
    hashing = _light("hashing")
    if not hashing.is_hash(algorithm):
        raise UserError(f"the index names a hash {algorithm!r} that this installation does not know")
    return hashing.get_hash(algorithm, data)


def inflate(compression: str, data: bytes) -> bytes:
    """Undo the compression of a shard."""
    return _light("compression").decompress(compression, data)


def shuffled(shard_samples: np.ndarray, seed: int, block_samples: int) -> np.ndarray:
    """All sample numbers of the shards in an order that mixes neighbours within about `block_samples`.

    streaming's py1e: shards in random order, their samples spread over a range around them, so that only a few
    shards are in use at any time.
    """
    return _light("shuffle").get_shuffle(
        "py1e", shard_samples, num_canonical_nodes=1, seed=seed, epoch=0, block_size=block_samples
    )
