"""Hashes and compression of the MDS format, next to streaming's own."""

import numpy as np
import pytest
from streaming.base import compression, hashing

from mosaic_dist.data import mds
from mosaic_dist.errors import UserError

CONTENT = np.random.default_rng(0).integers(0, 50, 5000).astype(np.uint16).tobytes()


def test_hashes_are_streamings():
    names = hashing.get_hashes()
    assert mds.HASH in names
    for name in names:
        for data in (b"", CONTENT):
            assert mds.file_hash(name, data) == hashing.get_hash(name, data), name


def test_what_streaming_compresses_is_decompressed():
    names = compression.get_compressions()
    assert {name.partition(":")[0] for name in names} == mds.DECOMPRESSORS.keys()
    for name in names - {f"zstd:{level}" for level in range(10, 22)}:  # slow to write
        assert mds.decompress(name, compression.compress(name, CONTENT)) == CONTENT, name


def test_every_compression_that_is_accepted_can_be_read():
    for name in (None, *compression.get_compressions()):
        mds.check_compression(name)
    for name in ("zstd:23", "snappy:1", "lz4", ""):
        with pytest.raises(UserError, match=rf"compression '{name}' is unknown; known: br, bz2, gz, snappy, zstd"):
            mds.check_compression(name)


@pytest.mark.parametrize("name", ["shake_128", "new", "xxh3", ""])
def test_an_unknown_hash_is_named(name):
    with pytest.raises(UserError, match=f"the index names the hash '{name}', which is unknown; known: blake2b.* xxh64"):
        mds.file_hash(name, b"")


@pytest.mark.parametrize("name", ["lz4", "zst", ""])
def test_an_unknown_compression_is_named(name):
    with pytest.raises(UserError, match=f"the index names the compression '{name}', which is unknown; known: br, bz2"):
        mds.decompress(name, b"")
