"""Documents of one file, read from its start or from a row within it. A damaged or unfit file is an error naming it."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mosaic_dist.errors import UserError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
LONGEST_BYTES = 1 << 30  # of a line or a text file: about ten times as much memory is needed to tokenise it
PARQUET_ROWS = 64  # that are Python texts at a time


class Row(NamedTuple):
    """A text and what is read of its file behind it: rows, the byte to go on at (where that is possible), bytes."""

    text: str
    row: int
    offset: int
    done_bytes: int


def read_file(path: str, field: str, row: int = 0, offset: int = 0) -> Iterator[Row]:
    """Documents of a file behind its first `row` rows, which end at byte `offset`.

    JSONL can be entered at the byte; compressed JSONL is inflated from the start, but not parsed; of Parquet, whole row
    groups are passed over.
    """
    stem, suffix = os.path.splitext(path)
    if suffix == ".parquet":
        yield from _read_parquet(path, field, row)
    elif suffix == ".jsonl":
        yield from _read_jsonl(path, field, row, offset)
    elif suffix in COMPRESSIONS and stem.endswith(".jsonl"):
        yield from _read_compressed_jsonl(path, field, row, COMPRESSIONS[suffix])
    elif row == 0:
        yield _read_text(path)


def _read_text(path: str) -> Row:
    size = os.path.getsize(path)
    if size > LONGEST_BYTES:
        raise _too_long(path)
    data = Path(path).read_bytes()
    return Row(data.decode("utf-8"), 1, len(data), len(data))


def _read_jsonl(path: str, field: str, row: int, offset: int) -> Iterator[Row]:
    with open(path, "rb") as file:
        file.seek(offset)
        for number, line in _lines(file, path, row):
            offset += len(line)
            if line.strip():
                yield Row(_parse(line, field, f"{path}:{number}"), number, offset, offset)


def _read_compressed_jsonl(path: str, field: str, row: int, compression: str) -> Iterator[Row]:
    with open(path, "rb") as raw:
        # pyarrow's stream reads files of several frames and, unlike zstandard's, complains about a cut one.
        inflated = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), compression))
        for number, line in _lines(inflated, path, 0):
            if number > row and line.strip():
                yield Row(_parse(line, field, f"{path}:{number}"), number, 0, raw.tell())


def _lines(file: Any, path: str, row: int) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, the first one behind `row`."""
    while line := file.readline(LONGEST_BYTES + 1):
        row += 1
        if len(line) > LONGEST_BYTES:
            raise _too_long(f"{path}:{row}")
        yield row, line


def _too_long(place: str) -> UserError:
    return UserError(
        f"{place} is longer than {LONGEST_BYTES:,} bytes, the longest that fits into memory when it is tokenised: "
        "cut it into several documents, or leave it out"
    )


def _parse(line: bytes, field: str, place: str) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 text (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise UserError(f"{place} is a {type(row).__name__}, not an object with a field {field!r}")
    return text_of(row, field, place)


def text_of(row: dict[str, Any], field: str, place: str) -> str:
    """The field of a row, checked to be text that can be written as UTF-8."""
    if field not in row:
        raise UserError(f"{place} has no field {field!r}; it has: {', '.join(map(str, row)) or 'none'}")
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{place}: field {field!r} is {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise UserError(f"{place}: field {field!r} is not Unicode text ({error.reason})") from None
    return text


def _read_parquet(path: str, field: str, row: int) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a whole Parquet file: {error}") from None
    with file:
        if field not in file.schema_arrow.names:
            raise UserError(f"{path} has no field {field!r}; it has: {', '.join(file.schema_arrow.names)}")
        size, rows, number = os.path.getsize(path), max(file.metadata.num_rows, 1), 0
        for group in range(file.num_row_groups):  # the unit of memory: one column of one row group
            group_rows = file.metadata.row_group(group).num_rows
            if number + group_rows <= row:
                number += group_rows
                continue
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if number > row:
                        checked = text_of({field: text}, field, f"{path}, row {number - 1}")
                        yield Row(checked, number, 0, size * number // rows)
