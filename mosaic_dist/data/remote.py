"""Datasets in a bucket: what describes them is fetched at the start, shards at their first use, into a local cache.

The cache is a folder for each content of a dataset.json, so a dataset that was prepared anew is another one. Processes,
jobs and hosts may share it: a file appears whole and proven under its name, or not at all, and nobody depends on
another's life. Locks are a courtesy, so that the ranks of a host fetch a shard once: who waits too long goes ahead.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from mosaic_dist.data import mds
from mosaic_dist.data.dataset import DATASET_NAME, DatasetInfo
from mosaic_dist.data.tokenizer import FILE_NAME, json_digest
from mosaic_dist.errors import UserError
from mosaic_dist.files import checksum

ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 1.0  # doubled after each attempt
ANSWER_SECONDS = 30.0
TURN_SECONDS = 120.0
"""For another process that is fetching the same file; then we fetch it too."""
STALE_SECONDS = 24 * 3600
"""What a killed process left half fetched is removed after that."""
ASIDE, LOCK = ".fetching", ".lock"

FINAL_CODES = {"400", "403", "404", "AccessDenied", "NoSuchBucket", "NoSuchKey"}
FINAL_NAMES = {"NoCredentialsError", "PartialCredentialsError", "InvalidBucketName"}
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

Problem = Callable[[Path], str | None]
"""What is wrong with a file that was fetched; None for nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteDataset(DatasetInfo):
    """A dataset whose shards come from `url` to `path` as they are used."""

    url: str = ""


def is_url(path: str) -> bool:
    """Whether a dataset's place is a URL."""
    return "://" in path


def open_remote(url: str, cache: str) -> RemoteDataset:
    """Fetch what describes a dataset into `cache`, and check it. UserError names the URL and what is wrong there."""
    if not cache:
        raise UserError(
            f"{url} is fetched as it is used: give --data.cache DIR, a folder on this machine with room for the dataset"
        )
    url, root = url.rstrip("/"), Path(cache).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        folder = _enter(url, root)
        _sweep(folder)
    except OSError as error:
        raise UserError(f"data.cache: {root} cannot be used ({error.strerror})") from None
    described = json.loads((folder / DATASET_NAME).read_text(encoding="utf-8"))
    wanted = {FILE_NAME: functools.partial(_tokenizer_problem, digest=described["tokenizer"])}
    for name, digest in described.get("tokenizer_files", {}).items():
        wanted[name] = functools.partial(_file_problem, digest=digest)
    for name, split in described["splits"].items():
        wanted[f"{name}/{mds.INDEX_NAME}"] = functools.partial(_file_problem, digest=split["index"])
    for name, problem in wanted.items():
        fetch(f"{url}/{name}", folder / name, problem)
    return dataclasses.replace(RemoteDataset.load(folder), url=url)


def _enter(url: str, root: Path) -> Path:
    """The folder of the dataset as it is now in the bucket; it holds the dataset.json."""
    with tempfile.TemporaryDirectory(prefix=".", suffix=ASIDE, dir=root) as aside:
        file = Path(aside, DATASET_NAME)
        fetch(f"{url}/{DATASET_NAME}", file, _description_problem)
        folder = root / f"{url.rpartition('/')[2]}-{checksum(file)[:16]}"
        folder.mkdir(exist_ok=True)
        os.replace(file, folder / DATASET_NAME)
    return folder


def _description_problem(path: Path) -> str | None:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        files = described.get("tokenizer_files", {})
        parts = [described["tokenizer"], *files.values(), *(split["index"] for split in described["splits"].values())]
        names = [*described["splits"], *files]
        names_are_plain = all(name and not set(name) & set("/\\") and name[0] != "." for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it describes no dataset ({type(error).__name__}: {error})"
    plain = names_are_plain and all(isinstance(part, str) for part in parts)
    return None if plain else "it describes no dataset"


def _file_problem(path: Path, digest: str) -> str | None:
    return None if checksum(path) == digest else f"it is not the one that {DATASET_NAME} describes"


def _tokenizer_problem(path: Path, digest: str) -> str | None:
    try:
        found = json_digest(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        return f"it is not JSON: {error}"
    return None if found == digest else f"it has digest {found}, the data was made with {digest}"


def fetch(url: str, path: Path, problem: Problem) -> bool:
    """Bring a file to `path` where it is not there yet; whether it was this call that did.

    UserError after several attempts, and at once for what no repetition mends: a file that is not there, for one.
    """
    if path.exists():
        return False
    path.parent.mkdir(exist_ok=True)
    with _turn(path):
        if path.exists():
            return False
        for attempt in range(ATTEMPTS):
            reason, is_final = _attempt(url, path, problem)
            if reason is None:
                return True
            if is_final or attempt == ATTEMPTS - 1:
                raise UserError(f"{url} cannot be fetched: {reason}")
            pause = FIRST_PAUSE_SECONDS * 2**attempt
            print(f"warning: fetching {url}: {reason}; again in {pause:g} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _attempt(url: str, path: Path, problem: Problem) -> tuple[str | None, bool]:
    """Why a file did not come, and whether that is final; (None, False) where it is there."""
    aside = None
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=ASIDE, dir=path.parent))
        mds.download(url, str(aside / path.name), ANSWER_SECONDS)
        if reason := problem(aside / path.name):
            return reason, False
        os.replace(aside / path.name, path)
        return None, False
    except UserError:
        raise
    except Exception as error:  # each storage library has its own
        return f"{type(error).__name__}: {error}", _is_final(error)
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _is_final(error: Exception) -> bool:
    code = str(getattr(error, "response", {}).get("Error", {}).get("Code"))
    return (
        isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError)
        or getattr(error, "errno", None) in FULL_DISK
        or code in FINAL_CODES
        or type(error).__name__ in FINAL_NAMES
    )


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Wait while another process of this host fetches the file; not for ever, and not for one that was killed."""
    name = path.with_name(f".{path.name}{LOCK}")
    deadline = time.monotonic() + TURN_SECONDS
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks
            lock = stack.enter_context(open(name, "w"))
            stack.callback(name.unlink, missing_ok=True)
            while not _locked(lock) and time.monotonic() < deadline and not path.exists():
                time.sleep(0.05)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed long ago had half fetched."""
    for left in (*folder.rglob(f".*{ASIDE}"), *folder.rglob(f".*{LOCK}")):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
