"""The parts of mosaicml-streaming that are used: MDS writing, MDS reading, the shuffle. Nothing else imports it.

Importing `streaming` takes several seconds (it pulls in torchvision and cloud clients), so the functions do it when
called, and a `--help` or a tokenising worker never pays for it.

`StreamingDataset` itself is not used, not even map-style: its constructor keeps state in POSIX shared memory and locks
under names that all jobs of a host share and that outlive kill -9 (clean_stale_shared_memory can remove a live job's),
starts and destroys a process group, needs LOCAL_WORLD_SIZE from the launcher, hangs or ends early on a missing shard,
and never checks the hash of a local file. The shards, the index and the shuffle below it need none of that: reading
them leaves nothing on the host and knows no rank.
"""

import importlib
from typing import Any

import numpy as np

from mosaic_dist.errors import UserError

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


def check_compression(compression: str | None) -> None:
    """UserError for a compression that streaming cannot write (it knows `zstd`, `zstd:1` and others)."""
    codecs = _streaming("compression")
    if compression is not None and not codecs.is_compression(compression):
        families = sorted({name.partition(":")[0] for name in codecs.get_compressions()})
        raise UserError(f"compression {compression!r} is unknown; known: {', '.join(families)}, with a level: zstd:1")


def open_writer(folder: str, dtype: str, length: int, compression: str | None, shard_bytes: int) -> Any:
    """A streaming `MDSWriter` of one fixed-length column of token ids: `write({COLUMN: ids})`, then `finish()`."""
    encoding = f"ndarray:{dtype}:{length}"
    return _streaming("format").MDSWriter(
        columns={COLUMN: encoding}, out=folder, compression=compression, hashes=[HASH], size_limit=shard_bytes
    )


def open_reader(folder: str, entry: dict[str, Any]) -> Any:
    """A streaming `MDSReader` of one shard of an index: `get_item(i)[COLUMN]`. It opens the file for each sample."""
    return _streaming("format").reader_from_json(folder, None, entry)


def file_hash(algorithm: str, data: bytes) -> str:
    """Hash of a file's bytes, as streaming writes it into the index."""
    hashing = _streaming("hashing")
    if not hashing.is_hash(algorithm):
        raise UserError(f"the index names a hash {algorithm!r} that this installation does not know")
    return hashing.get_hash(algorithm, data)


def inflate(compression: str, data: bytes) -> bytes:
    """Undo the compression of a shard."""
    return _streaming("compression").decompress(compression, data)


def shuffled(shard_samples: np.ndarray, seed: int, block_samples: int) -> np.ndarray:
    """All sample numbers of the shards in an order that mixes neighbours within about `block_samples`.

    streaming's py1e: shards in random order, their samples spread over a range around them, so that only a few
    shards are in use at any time.
    """
    return _streaming("shuffle").get_shuffle(
        "py1e", shard_samples, num_canonical_nodes=1, seed=seed, epoch=0, block_size=block_samples
    )
