"""The writing side of a dataset: a folder that gets its name when it is whole, and what its splits hold.

`<output>.unfinished` beside an output belongs to the process that holds its lock. In it, `data` becomes the output; the
rest is what a preparation needs to go on after it was killed (see journal.py).
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mosaic_dist.data import mds
from mosaic_dist.data.dataset import DATASET_NAME, DatasetInfo, SplitInfo
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.files import check_output_directory, checksum, publish_directory

SHARD_BYTES = 1 << 26
DATA, LOCK, PROGRESS = "data", "lock", "progress.json"


@contextlib.contextmanager
def new_dataset(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `output` to write into; it becomes `output` at the end, or is removed after an error.

    An existing output is refused, or with `overwrite` replaced at the end if it is a dataset.
    """
    with unfinished(output, overwrite) as aside:
        clear(aside)
        yield aside / DATA


@contextlib.contextmanager
def unfinished(output: Path, overwrite: bool) -> Iterator[Path]:
    """The folder beside `output`, locked; its `data` becomes `output` at the end.

    After an error it stays if there is progress to go on with, and is removed otherwise.
    """
    check_output_directory(output.parent)
    aside = output.with_name(f"{output.name}.unfinished")
    with _lock(aside):
        try:
            _check_output(output, overwrite)
            yield aside
            if output.exists():
                os.rename(output, aside / "replaced")
            publish_directory(aside / DATA, output)
        finally:
            if not has_progress(aside):
                shutil.rmtree(aside, ignore_errors=True)


def has_progress(aside: Path) -> bool:
    """Whether a preparation can go on here."""
    return (aside / PROGRESS).is_file() and (aside / DATA).is_dir()


def clear(aside: Path) -> None:
    """Remove what an earlier process left, and start with an empty `data`."""
    (aside / PROGRESS).unlink(missing_ok=True)  # the first, as it speaks of the others
    for path in aside.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    (aside / DATA).mkdir()


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists already; choose another output, or give --overwrite to replace it")
    if output.exists() and not (output / DATASET_NAME).is_file():
        raise UserError(f"{output} exists and is no dataset (it has no {DATASET_NAME}), so --overwrite leaves it alone")


def _lock(aside: Path) -> BinaryIO:
    """Make a folder that one process at a time has; the lock ends with the file or the process, however that ends."""
    while True:
        aside.mkdir(parents=True, exist_ok=True)
        try:
            file = open(aside / LOCK, "ab")  # noqa: SIM115
        except FileNotFoundError:  # the last owner has just removed the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:  # else it is the lock of a folder that is gone
                return file
        except BlockingIOError:
            file.close()
            raise UserError(f"another process is making this output right now: it holds {aside / LOCK}") from None
        file.close()


def finish_split(
    writer: Any, folder: Path, *, samples: int, tokens: int, documents: int, text_bytes: int, dropped_tokens: int = 0
) -> SplitInfo:
    """End an MDS writer's work in `folder` and describe the split."""
    writer.finish()
    return describe_split(
        folder,
        writer.shards,
        samples=samples,
        tokens=tokens,
        documents=documents,
        text_bytes=text_bytes,
        dropped_tokens=dropped_tokens,
    )


def describe_split(folder: Path, shards: list[dict[str, Any]], **counts: int) -> SplitInfo:
    """What dataset.json says of a split whose shards and index are written; `counts` are the other fields."""
    files = [shard["zip_data"] or shard["raw_data"] for shard in shards]
    return SplitInfo(
        shards=len(files),
        shard_bytes=sum(file["bytes"] for file in files),
        index=checksum(folder / mds.INDEX_NAME),
        **counts,
    )


def write_description(info: DatasetInfo, tokenizer: Tokenizer) -> None:
    """Write the tokenizer's files and dataset.json into the dataset's folder."""
    files = {name: checksum(info.path / name) for name in tokenizer.save(info.path)}
    description = dataclasses.replace(info, tokenizer_files=files).to_json()
    (info.path / DATASET_NAME).write_text(description, encoding="utf-8")
