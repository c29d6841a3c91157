"""Documents from files, folders, globs and Hugging Face datasets, in an order that is the same every time.

A damaged or unfit input is an error that names it. Only in folders and globs are files that are no UTF-8 text passed
over, because source trees hold images; they are counted and told.
"""

import glob
import io
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mosaic_dist.errors import UserError

STDLIB = "stdlib"  # the word for the running Python's own sources
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Documents:
    """The texts, to be iterated, and what a progress bar and a report want to know about them.

    `total_bytes` is the size of the input files (None where it is not known), `done_bytes` how much of it is read,
    `skipped` the files that are no UTF-8 text, `empty` the number of empty texts, which are passed over. Iterating
    raises UserError when there is no document at all.
    """

    def __init__(self, sources: list[str], total_bytes: int | None, read: "Callable[[Documents], Iterator[str]]"):
        self.sources, self.total_bytes, self._read = sources, total_bytes, read
        self.done_bytes, self.empty, self.skipped = 0, 0, list[str]()

    def __iter__(self) -> Iterator[str]:
        self.done_bytes, self.empty, self.skipped = 0, 0, []
        found = False
        for text in self._read(self):
            if text:
                found = True
                yield text
            else:
                self.empty += 1
        if not found:
            skipped = f", {len(self.skipped)} files that are no UTF-8 text" if self.skipped else ""
            raise UserError(f"no documents in {', '.join(self.sources)} ({self.empty} empty texts{skipped})")


def read_documents(inputs: Iterable[str], field: str = "text") -> Documents:
    """Documents of files, folders (recursive, without hidden names and `__pycache__`) and globs.

    `.jsonl`, `.jsonl.gz`, `.jsonl.zst` and `.parquet` hold a document per row, in `field`; any other file is one
    document. Order: inputs as given, files of a folder or glob sorted by path; a file that is met twice is read once.
    `stdlib` stands for the Python standard library's sources without site-packages, idlelib and tests.
    """
    inputs = list(inputs)
    files: dict[str, bool] = {}  # path -> whether the user named this very file
    for item in inputs:
        for path in _expand(item):
            files[path] = files.get(path, False) or path == item
    if not files:
        raise UserError(f"no files in {', '.join(inputs) or 'an empty list of inputs'}")
    sizes = {path: os.path.getsize(path) for path in files}

    def read(state: Documents) -> Iterator[str]:
        before = 0
        for path, named in files.items():
            try:
                for text, done_bytes in _read_file(path, field):
                    state.done_bytes = before + done_bytes
                    yield text
            except UnicodeDecodeError as error:
                if named:
                    raise UserError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason})") from None
                state.skipped.append(path)
            except OSError as error:  # pyarrow's errors of damaged files are OSErrors too
                raise UserError(f"{path} cannot be read: {error}") from None
            before += sizes[path]
            state.done_bytes = before

    return Documents(inputs, sum(sizes.values()), read)


def _expand(item: str) -> list[str]:
    """Files that an input stands for."""
    if item == STDLIB and not os.path.exists(item):
        return [path for path in _walk(sysconfig.get_path("stdlib"), STDLIB_SKIPPED) if path.endswith(".py")]
    path = os.path.expanduser(item)
    if os.path.isdir(path):
        return _walk(path)
    if os.path.exists(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
    if not found:
        raise UserError(f"input {item!r} does not exist (relative paths start at {os.getcwd()})")
    return [file for match in found for file in (_walk(match) if os.path.isdir(match) else [match])]


def _walk(folder: str, skipped: Iterable[str] = ()) -> list[str]:
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and name != "__pycache__" and name not in skipped]
        files += [os.path.join(place, name) for name in names if name[0] != "."]
    return sorted(files)


def _read_file(path: str, field: str) -> Iterator[tuple[str, int]]:
    """(text, bytes of the file that are read) of each document in a file."""
    stem, suffix = os.path.splitext(path)
    if suffix == ".parquet":
        yield from _read_parquet(path, field)
    elif suffix == ".jsonl" or (suffix in COMPRESSIONS and stem.endswith(".jsonl")):
        yield from _read_jsonl(path, field, COMPRESSIONS.get(suffix))
    else:
        data = Path(path).read_bytes()
        yield data.decode("utf-8"), len(data)


def _read_jsonl(path: str, field: str, compression: str | None) -> Iterator[tuple[str, int]]:
    with open(path, "rb") as raw:
        # pyarrow's stream reads files of several frames and, unlike zstandard's, complains about a cut one.
        inflated = compression and io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), compression))
        for number, line in enumerate(inflated or raw, 1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{place} is not UTF-8 text (byte {error.start} of the line)") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{place} is not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(row, dict):
                raise UserError(f"{place} is a {type(row).__name__}, not an object with a field {field!r}")
            yield _text(row, field, place), raw.tell()


def _text(row: dict[str, Any], field: str, place: str) -> str:
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


def _read_parquet(path: str, field: str) -> Iterator[tuple[str, int]]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a whole Parquet file: {error}") from None
    with file:
        if field not in file.schema_arrow.names:
            raise UserError(f"{path} has no field {field!r}; it has: {', '.join(file.schema_arrow.names)}")
        groups, row, size = file.num_row_groups, 0, os.path.getsize(path)
        for group in range(groups):  # the unit of memory: one column of one row group
            for chunk in file.read_row_group(group, columns=[field]).column(field).chunks:
                for text in chunk.to_pylist():
                    yield _text({field: text}, field, f"{path}, row {row}"), size * (group + 1) // groups
                    row += 1


def hugging_face_documents(name: str, split: str = "train", field: str = "text") -> Documents:
    """Documents of a dataset on the Hugging Face hub (`name` or `name:config`) or in a local folder, streamed."""
    import datasets  # here, because it takes two seconds that only this function needs

    path, _, config = name.partition(":")

    def read(_: Documents) -> Iterator[str]:
        try:
            rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
            for i, row in enumerate(rows):
                yield _text(row, field, f"dataset {name}, split {split}, row {i}")
        except UserError:
            raise
        except Exception as error:  # the package raises many kinds, for the hub, the network and the files
            raise UserError(f"dataset {name!r}, split {split!r}: {type(error).__name__}: {error}") from error

    return Documents([f"{name} ({split})"], None, read)


def choose_documents(
    inputs: str | tuple[str, ...] | None, more: Iterable[Any], dataset: str | None, split: str, field: str
) -> Documents:
    """Documents as the tools' command lines name them: `--input a,b` with further words, or `--dataset`."""
    listed = [inputs] if isinstance(inputs, str) and os.path.exists(inputs) else inputs  # a name may hold a comma
    names = listed.split(",") if isinstance(listed, str) else list(listed or ())
    names += map(str, more)
    if (dataset is None) == (not names):
        raise UserError("give the text either with --input (files, folders, globs) or with --dataset (Hugging Face)")
    if dataset is not None:
        return hugging_face_documents(dataset, split, field)
    return read_documents(names, field)
