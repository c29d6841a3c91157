"""Proof that a dataset is whole: every byte of every shard, and what the descriptions say of them.

`dataset.json` is proven by its own checksum, and what it says of the other files is checked against them; the counts
of documents, text, sources and dropped tokens stand in it alone.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mosaic_dist.data import mds
from mosaic_dist.data.arithmetic import read_rows
from mosaic_dist.data.dataset import DATASET_NAME, DatasetInfo
from mosaic_dist.data.encode import token_dtype
from mosaic_dist.data.shards import Shards
from mosaic_dist.data.tokenizer import FILE_NAME, Tokenizer, json_digest
from mosaic_dist.errors import UserError
from mosaic_dist.files import checksum

CHECKED_ROWS = 4096  # that are looked at together


class Problem(NamedTuple):
    """A file of a dataset, as a path below it, and what is wrong with it."""

    file: str
    told: str


class Report(NamedTuple):
    """What was read of a dataset, and every broken file."""

    path: Path
    files: int
    size_bytes: int
    problems: list[Problem]


class _Shard(NamedTuple):
    """A shard as its index describes it."""

    split: str
    entry: dict[str, Any]

    def size_bytes(self, info: DatasetInfo) -> int:
        """Bytes of its files that are there."""
        return sum(_size(info.path / self.split / file["basename"]) or 0 for file in self.files())

    def files(self) -> list[dict[str, Any]]:
        """Its files: the compressed one, if there is one, before the other."""
        return [file for file in (self.entry["zip_data"], self.entry["raw_data"]) if file]


class _Content(NamedTuple):
    """What is wrong with a shard, and the scored tokens that were found in it, where it could be read."""

    problems: list[Problem]
    tokens: int | None


class _Unproven(DatasetInfo):
    """A description that is read while the files it names may be damaged or missing."""

    def _check_files(self) -> None:
        """Nothing: `verify` looks at the files one by one, and goes on where one is wrong."""


def verify(path: str | Path, threads: int = 4) -> Report:
    """Read every file of a dataset, with a progress bar, and report the broken ones, in order of their names.

    Nothing is written. A thread holds one shard in memory. UserError where there is no folder.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"no dataset at {path}; give the folder that a tool of data_prep has made")
    try:
        info = _Unproven.load(path)
    except UserError as error:
        told = f"{error}; without it the other files cannot be checked"
        return Report(path, 1, 0, [Problem(DATASET_NAME, told)])
    problems = [*_tokenizer_problems(info)]
    expected = {DATASET_NAME, FILE_NAME, *info.tokenizer_files}
    shards: list[_Shard] = []
    for split in info.splits:
        expected.add(f"{split}/{mds.INDEX_NAME}")
        entries, wrong = _entries(info, split)
        problems += wrong
        mine = [_Shard(split, entry) for entry in entries]
        expected |= {f"{split}/{file['basename']}" for shard in mine for file in shard.files()}
        shards += mine
        if info.answer_loss is not None:
            expected.add(f"{split}.jsonl")
    found = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}
    # Without an index nobody knows which shards belong to it.
    lost = [split for split in info.splits if split not in {shard.split for shard in shards}]
    strays = [name for name in found - expected if not name.startswith(tuple(f"{split}/" for split in lost))]
    problems += [Problem(name, "is a stray: no description names it") for name in strays]
    problems += _shard_problems(info, shards, threads)
    if info.answer_loss is not None:
        doubtful = {Path(problem.file).parts[0] for problem in problems}
        problems += [found for split in info.splits if split not in doubtful for found in _row_problems(info, split)]
    size_bytes = sum(shard.size_bytes(info) for shard in shards)
    return Report(path, len(found & expected), size_bytes, sorted(problems))


def _tokenizer_problems(info: DatasetInfo) -> Iterator[Problem]:
    """The tokenizer against what dataset.json says of it."""
    problems = []
    for name, written in info.tokenizer_files.items():
        if not (info.path / name).is_file():
            problems.append(Problem(name, "is missing"))
        elif checksum(info.path / name) != written:
            problems.append(Problem(name, f"is not the one that {DATASET_NAME} describes"))
    try:
        digest = json_digest(json.loads(info.tokenizer_path.read_text(encoding="utf-8")))
        if digest != info.tokenizer:
            told = f"is not the one of the data: its digest is {digest}, not {info.tokenizer}"
            problems.append(Problem(FILE_NAME, told))
    except FileNotFoundError:
        problems.append(Problem(FILE_NAME, "is missing"))
    except ValueError as error:
        problems.append(Problem(FILE_NAME, f"is damaged: {error}"))
    yield from problems
    if problems:
        return
    tokenizer = Tokenizer.load(info.tokenizer_path)
    described = (info.vocab_size, info.eos_id, info.dtype)
    expected = (tokenizer.vocab_size, tokenizer.eos_id, token_dtype(tokenizer.vocab_size))
    if described != expected:
        yield Problem(DATASET_NAME, f"says vocab_size, eos_id, dtype {described}, and the tokenizer {expected}")


def _entries(info: DatasetInfo, split: str) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The shards that an index names, none where it cannot be believed, and what is wrong with the index."""
    name = f"{split}/{mds.INDEX_NAME}"
    file = info.path / name
    if not file.is_file():
        return [], [Problem(name, "is missing; without it no shard of the split can be checked")]
    if checksum(file) != info.splits[split].index:
        return [], [Problem(name, f"is not the one that {DATASET_NAME} describes; without it no shard can be checked")]
    try:
        entries = info.index(split)
        for entry in entries:
            mds.check_entry(entry, info.dtype, info.seq_len + 1)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [], [Problem(name, f"does not describe shards of this dataset ({type(error).__name__}: {error})")]
    sums = {
        "samples": sum(entry["samples"] for entry in entries),
        "shards": len(entries),
        "shard_bytes": sum((entry["zip_data"] or entry["raw_data"])["bytes"] for entry in entries),
    }
    told = {key: getattr(info.splits[split], key) for key in sums}
    return entries, [] if told == sums else [Problem(DATASET_NAME, f"says {told} of {split}, and {name} {sums}")]


# --- shards -------------------------------------------------------------------------------------------------------


def _shard_problems(info: DatasetInfo, shards: list[_Shard], threads: int) -> list[Problem]:
    """Read all shards; what is wrong with them, and with the counts of tokens in dataset.json."""
    problems: list[Problem] = []
    tokens: dict[str, list[int | None]] = {split: [] for split in info.splits}
    total = sum(shard.size_bytes(info) for shard in shards)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=None) as bar,
    ):
        running = {pool.submit(_check_shard, info, shard): shard for shard in shards}
        for done in as_completed(running):
            shard, content = running[done], done.result()
            problems += content.problems
            tokens[shard.split].append(content.tokens)
            bar.update(shard.size_bytes(info))
    for split, counts in tokens.items():
        known = [count for count in counts if count is not None]
        if counts and len(known) == len(counts) and sum(known) != info.splits[split].tokens:
            told = f"says {info.splits[split].tokens} scored tokens of {split}, and the shards have {sum(known)}"
            problems.append(Problem(DATASET_NAME, told))
    return problems


def _check_shard(info: DatasetInfo, shard: _Shard) -> _Content:
    """Check all files of a shard that must be there or are, and then its tokens."""
    problems, raw = [], None
    for file in shard.files():
        data, wrong = _read(info, shard, file)
        problems += wrong
        if wrong or data is None:
            continue
        if file is shard.entry["raw_data"]:
            raw = data
            continue
        raw, wrong = _inflated(shard, data)
        problems += wrong
    if raw is None:
        return _Content(problems, None)
    name = f"{shard.split}/{shard.files()[0]['basename']}"
    tokens_BT = rows_of(raw, shard.entry["samples"], info.seq_len + 1, info.dtype)
    if tokens_BT is None:
        told = f"does not hold the {shard.entry['samples']} samples that the index says"
        return _Content([*problems, Problem(name, told)], None)
    if (largest := int(tokens_BT.max())) >= info.vocab_size:
        count = int((tokens_BT >= info.vocab_size).sum())
        told = f"has {count} token ids up to {largest}, and the vocabulary has {info.vocab_size}"
        problems.append(Problem(name, told))
    return _Content(problems, _scored(info, tokens_BT))


def _read(info: DatasetInfo, shard: _Shard, file: dict[str, Any]) -> tuple[bytes | None, list[Problem]]:
    """A file's bytes, checked. The inflated form of a compressed shard need not be there."""
    name = f"{shard.split}/{file['basename']}"
    path = info.path / name
    if _size(path) is None and shard.entry["zip_data"] and file is shard.entry["raw_data"]:
        return None, []
    try:
        data = path.read_bytes()
    except OSError as error:
        told = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        return None, [Problem(name, told)]
    if len(data) != file["bytes"]:
        return None, [Problem(name, f"has {len(data):,} bytes, and the index says {file['bytes']:,}")]
    return data, _hash_problems(name, file, data)


def _hash_problems(name: str, file: dict[str, Any], data: bytes, whose: str = "its") -> list[Problem]:
    """Every hash that the index has of a file."""
    return [
        Problem(name, f"is damaged: {whose} {algorithm} is not {written}")
        for algorithm, written in file["hashes"].items()
        if mds.file_hash(algorithm, data) != written
    ]


def _inflated(shard: _Shard, packed: bytes) -> tuple[bytes | None, list[Problem]]:
    """What is in a compressed file, checked against the hashes of the inflated one."""
    name = f"{shard.split}/{shard.entry['zip_data']['basename']}"
    try:
        data = mds.decompress(shard.entry["compression"], packed)
    except Exception as error:  # each compression has its own
        return None, [Problem(name, f"cannot be inflated ({type(error).__name__}: {error})")]
    wrong = _hash_problems(name, shard.entry["raw_data"], data, "when inflated its")
    return (None, wrong) if wrong else (data, [])


def rows_of(raw: bytes, rows: int, length: int, dtype: str) -> np.ndarray | None:
    """Tokens [rows, length] of an MDS shard's bytes; None where it holds another number of rows.

    A shard is the number of rows, where each begins and the last ends (uint32 all), a description, and the rows.
    """
    row_bytes = length * np.dtype(dtype).itemsize
    if len(raw) < 4 * (rows + 2) or int.from_bytes(raw[:4], "little") != rows:
        return None
    places = np.frombuffer(raw, np.uint32, rows + 1, 4).astype(np.int64)
    if places[-1] != len(raw) or (np.diff(places) != row_bytes).any():
        return None
    return np.frombuffer(raw, dtype, rows * length, int(places[0])).reshape(rows, length)


def _scored(info: DatasetInfo, tokens_BT: np.ndarray) -> int:
    """Tokens that training scores, as dataset.json counts them."""
    if info.answer_loss is None:
        return tokens_BT.shape[0] * info.seq_len
    parts = (tokens_BT[i : i + CHECKED_ROWS] for i in range(0, len(tokens_BT), CHECKED_ROWS))
    return sum(int((~info.answer_loss.unscored(part_BT)).sum()) for part_BT in parts)


def _row_problems(info: DatasetInfo, split: str) -> list[Problem]:
    """The lines of a split's JSONL file, which has no checksum, against the tokens of its shards, which are proven."""
    name = f"{split}.jsonl"
    try:
        tokenizer, rows = info.load_tokenizer(), read_rows(info.path, split)
        shards = Shards(info, split, hashes=False)
        if len(rows) != len(shards):
            return [Problem(name, f"has {len(rows)} rows, and the shards have {len(shards)}")]
        for start in range(0, len(rows), CHECKED_ROWS):
            texts = [row.text for row in rows[start : start + CHECKED_ROWS]]
            ids = [[tokenizer.bos_id, *row, tokenizer.eos_id] for row in tokenizer.encode_batch(texts)]
            tokens_BT = shards.read(np.arange(start, start + len(texts)))
            for i, (row, row_T) in enumerate(zip(ids, tokens_BT.tolist(), strict=True)):
                if row != row_T[: len(row)]:
                    return [Problem(name, f"row {start + i} ({texts[i]!r}) is not what the shards have there")]
    except UserError as error:
        return [Problem(name, f"cannot be checked: {error}")]
    return []


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
