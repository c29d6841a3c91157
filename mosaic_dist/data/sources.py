"""Documents from files, folders, globs and Hugging Face datasets, in an order that is the same every time.

A damaged or unfit input is an error that names it. Only in folders and globs are files that are no UTF-8 text passed
over, because source trees hold images; they are counted and told.
"""

import glob
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from mosaic_dist.data.documents import Document, Place
from mosaic_dist.data.readers import read_file, text_of
from mosaic_dist.errors import UserError

STDLIB = "stdlib"  # the word for the running Python's own sources
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
START = Place()

Found = tuple[str, int, int, int, int, int]  # text, number of the input, and file, row, offset, done_bytes of a Place


class Documents:
    """The texts, to be iterated, and what a progress bar, a report and a preparation that goes on want to know of them.

    `total_bytes` is the size of the input files (None where it is not known), `done_bytes` how much of it is read,
    `skipped` the number of files that are no UTF-8 text, `empty` of empty texts, which are passed over. `identity`
    tells what makes the texts the same in another process (None where nothing does). Iterating raises UserError when
    there is no document at all.
    """

    def __init__(
        self,
        sources: list[str],
        total_bytes: int | None,
        read: "Callable[[Documents, Place], Iterator[Found]]",
        identity: Callable[[], dict[str, Any]] | None = None,
    ):
        self.sources, self.total_bytes, self._read, self._identity = sources, total_bytes, read, identity
        self.done_bytes = self.empty = self.skipped = 0

    def __iter__(self) -> Iterator[str]:
        return (document.text for document in self.read())

    def read(self, start: Place = START) -> Iterator[Document]:
        """Documents behind a place that an earlier reading has told."""
        self.done_bytes, self.empty, self.skipped = start.done_bytes, start.empty, start.skipped
        found = start != START
        for text, source, file, row, offset, done_bytes in self._read(self, start):
            self.done_bytes = done_bytes
            if not text:
                self.empty += 1
                continue
            found = True
            place = Place(
                file=file, row=row, offset=offset, done_bytes=done_bytes, empty=self.empty, skipped=self.skipped
            )
            yield Document(text, source, place)
        if not found:
            skipped = f", {self.skipped} files that are no UTF-8 text" if self.skipped else ""
            named = ", ".join(self.sources) or "the texts given"
            raise UserError(f"no documents in {named} ({self.empty} empty texts{skipped})")

    def identity(self) -> dict[str, Any] | None:
        """What must be equal for a place of one process to mean the same in another."""
        return self._identity and self._identity()


def given_documents(texts: Iterable[str]) -> Documents:
    """Texts that are at hand; a preparation of them cannot go on in another process."""

    def read(_: Documents, start: Place) -> Iterator[Found]:
        assert start == START, "nobody knows whether the texts are the same"
        for row, text in enumerate(texts, 1):
            yield text, 0, 0, row, 0, 0

    return Documents([], None, read)


def read_documents(inputs: Iterable[str], field: str = "text") -> Documents:
    """Documents of files, folders (recursive, without hidden names and `__pycache__`) and globs.

    `.jsonl`, `.jsonl.gz`, `.jsonl.zst` and `.parquet` hold a document per row, in `field`; any other file is one
    document. Order: inputs as given, files of a folder or glob sorted by path; a file that is met twice is read once.
    `stdlib` stands for the Python standard library's sources without site-packages, idlelib and tests.
    """
    inputs = list(inputs)
    files: dict[str, tuple[int, bool]] = {}  # path -> the first input with it, and whether an input is this very file
    for number, item in enumerate(inputs):
        for path in _expand(item):
            first, named = files.get(path, (number, False))
            files[path] = first, named or path == item
    if not files:
        raise UserError(f"no files in {', '.join(inputs) or 'an empty list of inputs'}")
    status = {path: os.stat(path) for path in files}

    def read(state: Documents, start: Place) -> Iterator[Found]:
        before = 0
        for file, (path, (source, named)) in enumerate(files.items()):
            if file >= start.file:
                row, offset = (start.row, start.offset) if file == start.file else (0, 0)
                try:
                    for found in read_file(path, field, row, offset):
                        yield found.text, source, file, found.row, found.offset, before + found.done_bytes
                except UnicodeDecodeError as error:
                    if named:
                        raise UserError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason})") from None
                    state.skipped += 1
                except (OSError, pa.ArrowInvalid) as error:  # pyarrow's other errors of damaged files are OSErrors
                    raise UserError(f"{path} cannot be read: {error}") from None
            before += status[path].st_size
            state.done_bytes = before

    def identity() -> dict[str, Any]:
        found = {os.path.abspath(path): [file.st_size, file.st_mtime_ns] for path, file in status.items()}
        return {"input": inputs, "field": field, "files": found}

    return Documents(inputs, sum(file.st_size for file in status.values()), read, identity)


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


def hugging_face_documents(name: str, split: str = "train", field: str = "text") -> Documents:
    """Documents of a dataset on the Hugging Face hub (`name` or `name:config`) or in a local folder, streamed.

    To go on, the rows that are done are read again and passed over. The builder's hash, which covers the revision and
    the files' dates, tells whether the dataset is the same.
    """
    path, _, config = name.partition(":")

    def builder() -> Any:
        import datasets  # here, because it takes two seconds that only this function needs

        try:
            return datasets.load_dataset_builder(path, config or None)
        except Exception as error:
            raise _failed(name, split, error) from error

    def read(_: Documents, start: Place) -> Iterator[Found]:
        try:
            rows = builder().as_streaming_dataset(split=split).skip(start.row)
            for i, row in enumerate(rows, start.row):
                yield text_of(row, field, f"dataset {name}, split {split}, row {i}"), 0, 0, i + 1, 0, 0
        except UserError:
            raise
        except Exception as error:
            raise _failed(name, split, error) from error

    def identity() -> dict[str, Any]:
        return {"dataset": name, "split": split, "field": field, "dataset_hash": builder().hash}

    return Documents([f"{name} ({split})"], None, read, identity)


def _failed(name: str, split: str, error: Exception) -> UserError:
    """One error for the many kinds that the package raises, for the hub, the network and the files."""
    return UserError(f"dataset {name!r}, split {split!r}: {type(error).__name__}: {error}")


def choose_documents(inputs: str | None, more: Iterable[str], dataset: str | None, split: str, field: str) -> Documents:
    """Documents as the tools' command lines name them: `--input a,b` with further words, or `--dataset`."""
    inputs = inputs or ""
    named = [inputs] if os.path.exists(inputs) else inputs.split(",")  # a name may hold a comma
    names = [*filter(None, named), *more]
    if (dataset is None) == (not names):
        raise UserError("give the text either with --input (files, folders, globs) or with --dataset (Hugging Face)")
    if dataset is not None:
        return hugging_face_documents(dataset, split, field)
    return read_documents(names, field)
