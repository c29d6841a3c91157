"""Which documents are tokenised: neither too short nor too long, and each text once if that is asked for."""

import os
from collections.abc import Iterator
from pathlib import Path

import xxhash

from mosaic_dist.data.documents import Chosen, Mark
from mosaic_dist.data.sources import Documents
from mosaic_dist.errors import UserError

DIGEST_BYTES = 16
BUCKETS = 1 << 16


class Seen:
    """Digests of texts (xxh3-128), in memory and in a file that a later process can go on with.

    The first two bytes of a digest choose a bucket, which holds the other 14 one behind another: 17.7 bytes a document
    are measured at five million, where a `set` of them takes 96; and 2 microseconds.
    """

    def __init__(self, path: Path, count: int = 0):
        """Take the first `count` digests of the file and forget the others. UserError where there are fewer."""
        self.buckets = [bytearray() for _ in range(BUCKETS)]
        self.file = open(path, "a+b")  # noqa: SIM115
        if path.stat().st_size < count * DIGEST_BYTES:
            raise UserError(f"{path} is damaged, so the preparation cannot go on: give --restart")
        self.file.truncate(count * DIGEST_BYTES)
        self.file.seek(0)
        for _ in range(count):
            self._add(self.file.read(DIGEST_BYTES))

    def add(self, text: bytes) -> bool:
        """True for a text that has not been here before, which it is from now on."""
        digest = xxhash.xxh3_128_digest(text)
        is_new = self._add(digest)
        if is_new:
            self.file.write(digest)
        return is_new

    def _add(self, digest: bytes) -> bool:
        bucket, rest = self.buckets[int.from_bytes(digest[:2], "big")], digest[2:]
        at = bucket.find(rest)
        while at >= 0 and at % len(rest):  # the end of one digest and the start of the next
            at = bucket.find(rest, at + 1)
        if at < 0:
            bucket += rest
        return at < 0

    def sync(self) -> None:
        """Make the file durable."""
        self.file.flush()
        os.fsync(self.file.fileno())


class Selection:
    """The documents that are kept, behind a mark; each carries the mark behind it. `mark` is that of the newest one.

    The bytes of a text are those of its UTF-8 form. `seen` (None: copies are kept) must hold the texts up to the mark.
    """

    def __init__(self, documents: Documents, min_bytes: int, max_bytes: int | None, seen: Seen | None, mark: Mark):
        if max_bytes is not None and max_bytes < min_bytes:
            raise UserError(f"max_document_bytes ({max_bytes}) must be at least min_document_bytes ({min_bytes})")
        self.documents, self.min_bytes, self.max_bytes, self.seen = documents, min_bytes, max_bytes, seen
        self.mark = mark
        self.filtered, self.duplicates = mark.filtered, mark.duplicates

    def __iter__(self) -> Iterator[Chosen]:
        for text, source, place in self.documents.read(self.mark.place):
            if self._keep(text):
                self.mark = Mark(
                    place=place,
                    documents=self.mark.documents + 1,
                    filtered=self.filtered,
                    duplicates=self.duplicates,
                )
                yield Chosen(text, source, self.mark)

    def _keep(self, text: str) -> bool:
        """Whether a document is taken; counts it otherwise."""
        if self.min_bytes <= 1 and self.max_bytes is None and self.seen is None:
            return True
        data = text.encode()
        if len(data) < self.min_bytes or (self.max_bytes is not None and len(data) > self.max_bytes):
            self.filtered += 1
            return False
        if self.seen is not None and not self.seen.add(data):
            self.duplicates += 1
            return False
        return True
