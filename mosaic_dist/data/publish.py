"""The writing side of a dataset: a folder that gets its name when it is whole, and what its splits hold."""

import contextlib
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mosaic_dist.data import mds
from mosaic_dist.data.dataset import DATASET_NAME, DatasetInfo, SplitInfo
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.files import checksum, publish_directory, remove_directory

SHARD_BYTES = 1 << 26


@contextlib.contextmanager
def new_dataset(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `output` to write into; it becomes `output` at the end, or is removed after an error.

    An existing output is refused, or with `overwrite` replaced at the end if it is a dataset.
    """
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists already; choose another output, or give --overwrite to replace it")
    if output.exists() and not (output / DATASET_NAME).is_file():
        raise UserError(f"{output} exists and is no dataset (it has no {DATASET_NAME}), so --overwrite leaves it alone")
    aside = _make_aside(output)
    try:
        yield aside
        if output.exists():
            remove_directory(output)
        publish_directory(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _make_aside(output: Path) -> Path:
    """A new folder beside the output; what killed runs of this host left of the same output is removed first."""
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{output.name}.tmp.{socket.gethostname()}."
    for left in output.parent.glob(f"{glob.escape(prefix)}*"):
        process = left.name.removeprefix(prefix)
        if process.isdigit() and not Path("/proc", process).exists():
            shutil.rmtree(left, ignore_errors=True)
    aside = output.with_name(f"{prefix}{os.getpid()}")
    aside.mkdir()
    return aside


def finish_split(
    writer: Any, folder: Path, *, samples: int, tokens: int, documents: int, text_bytes: int, dropped_tokens: int = 0
) -> SplitInfo:
    """End an MDS writer's work in `folder` and describe the split."""
    writer.finish()
    files = [shard["zip_data"] or shard["raw_data"] for shard in writer.shards]
    return SplitInfo(
        samples=samples,
        tokens=tokens,
        documents=documents,
        text_bytes=text_bytes,
        dropped_tokens=dropped_tokens,
        shards=len(files),
        shard_bytes=sum(file["bytes"] for file in files),
        index=checksum(folder / mds.INDEX_NAME),
    )


def write_description(info: DatasetInfo, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json and dataset.json into the dataset's folder."""
    tokenizer.save(info.path)
    (info.path / DATASET_NAME).write_text(info.to_json(), encoding="utf-8")
