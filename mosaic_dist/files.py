"""Files that appear whole or not at all, and checksums that prove what is in them."""

import os
import re
import shutil
from pathlib import Path

import xxhash

from mosaic_dist.errors import UserError

CHUNK_BYTES = 8 << 20


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable (a rename is not, until its directory is synced)."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


WRITEBACK_BYTES = 32 << 20


class SteadyWriter:
    """Writes to a file and lets the system bring every WRITEBACK_BYTES to the disk at once, instead of at an fsync.

    Otherwise the disk idles while the data is made, and then everybody waits for the disk. What is there leaves the
    page cache, so this is not for files that are read again at once.
    """

    def __init__(self, handle: int):
        self._handle = handle
        self._start = self._end = os.lseek(handle, 0, os.SEEK_CUR)

    def write(self, data: memoryview) -> None:
        """Write all of it."""
        while data:  # one call writes at most 2 GiB, and less on a disk that fills up
            written = os.write(self._handle, data[:WRITEBACK_BYTES])
            data = data[written:]
            self._end += written
            if self._end - self._start >= WRITEBACK_BYTES:
                self._hand_over()

    def seek(self, position: int) -> None:
        """Go on writing at another byte of the file."""
        if position != self._end:
            self._hand_over()
            self._start = self._end = os.lseek(self._handle, position, os.SEEK_SET)

    def _hand_over(self) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, self._start, self._end - self._start, os.POSIX_FADV_DONTNEED)
        self._start = self._end


ASIDE = re.compile(r"\..+\.\d+\.tmp")
"""Names of files that `write_atomic` has not finished."""


def check_output_file(path: str | Path) -> None:
    """UserError unless `path` is a regular file or free, with nothing but directories above it.

    `write_atomic` checks this too; call it first where the content takes long to make. A rename would replace whatever
    has the name: a pipe that somebody reads, or, for root, /dev/null of the whole machine.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = "directory" if path.is_dir() else "pipe, device or socket"
        raise UserError(f"{path} is a {kind} and is not replaced; name a regular file to write")
    check_output_directory(path.parent)


def check_output_directory(path: str | Path) -> None:
    """UserError unless `path` is a directory, or could become one."""
    path = Path(path)
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise UserError(f"{nearest} is not a directory, so nothing is written to {path}; choose another output")


def check_new_directory(path: str | Path) -> None:
    """UserError unless a new directory can appear at `path`."""
    path = Path(path)
    check_output_directory(path)
    if path.exists():
        raise UserError(f"{path} exists already; remove it, or choose another --output")


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one, never a part.

    A symbolic link stays, and what it points to is written. UserError for what is not a regular file.
    """
    check_output_file(path)
    path = Path(os.path.realpath(path))
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_directory(path.parent)


def publish_directory(aside: str | Path, final: str | Path) -> None:
    """Make a finished directory visible under its final name: sync every file and folder in it, then rename.

    `final` must not exist. After this returns, a power loss cannot take the directory back.
    """
    aside, final = Path(aside), Path(final)
    for folder, _, names in os.walk(aside):
        for name in names:
            handle = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_directory(Path(folder))
    os.rename(aside, final)
    sync_directory(final.parent)


def remove_directory(path: str | Path) -> None:
    """Delete a directory so that a crash in the middle leaves no half of it under its own name."""
    path = Path(path)
    doomed = path.with_name(f".{path.name}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    sync_directory(path.parent)
    shutil.rmtree(doomed)


def checksum(path: str | Path) -> str:
    """Return the xxh3-128 digest of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
