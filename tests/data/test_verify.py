"""One damage at a time, and the file that is named for it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mosaic_dist.data.arithmetic import prepare_arithmetic
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.expressions import Expressions
from mosaic_dist.data.mds import HASH, file_hash
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.shards import Shards
from mosaic_dist.data.verify import rows_of, verify
from mosaic_dist.files import checksum
from tests.data.conftest import SEQ_LEN

Damage = Callable[[Path], None]


def problems(path: Path, threads: int = 2) -> list[tuple[str, str]]:
    return [(problem.file, problem.told) for problem in verify(path, threads).problems]


def flip(byte: int, bit: int = 0) -> Damage:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[byte] ^= 1 << bit
        file.write_bytes(data)

    return damage


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    """Change a JSON file, and leave out the checksum of its content."""
    content = json.loads(path.read_text())
    content.pop("xxh3_128", None)
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def copied(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset.path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def packed(documents, tokenizer, tmp_path_factory) -> DatasetInfo:
    output = tmp_path_factory.mktemp("packed") / "set"
    return prepare(
        documents, tokenizer, output, SEQ_LEN, validation_fraction=0.2, workers=1, compression="zstd",
        shard_bytes=SEQ_LEN * 2 * 50,
    )  # fmt: skip


def another_count(file: Path) -> None:
    """One digit of a count that nothing else can prove."""
    text = file.read_text()
    found = re.search(r'"text_bytes": (\d)', text)
    digit = str((int(found[1]) + 1) % 10)
    file.write_text(text[: found.start(1)] + digit + text[found.end(1) :])


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> DatasetInfo:
    output = tmp_path_factory.mktemp("questions") / "set"
    return prepare_arithmetic(Expressions(operands=2, low=0, high=9, ops="+"), output, 60, seq_len=16)


def test_whole_datasets(dataset, packed, questions):
    for info in (dataset, packed, questions):
        report = verify(info.path)
        assert report.problems == []
        assert report.files == sum(file.is_file() for file in info.path.rglob("*"))
        assert report.size_bytes == sum(split.shard_bytes for split in info.splits.values())


SHARD = "train/shard.00001.mds"


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        (SHARD, flip(-1), "is damaged: its xxh3_64 is not"),
        (SHARD, flip(0), "is damaged: its xxh3_64 is not"),
        (SHARD, cut, "bytes, and the index says"),
        (SHARD, Path.unlink, "is missing"),
        ("train/index.json", flip(20), "is not the one that dataset.json describes"),
        ("train/index.json", cut, "is not the one that dataset.json describes"),
        ("validation/index.json", Path.unlink, "is missing"),
        ("tokenizer.json", flip(0), "is damaged"),
        ("tokenizer.json", cut, None),  # its last byte is the line's end, which means nothing
        ("tokenizer.json", Path.unlink, "is missing"),
        ("tokenizer_config.json", flip(10), "is not the one that dataset.json describes"),
        ("tokenizer_config.json", Path.unlink, "is missing"),
        ("dataset.json", flip(0), "is damaged"),
        ("dataset.json", another_count, "does not match its checksum"),
        ("dataset.json", lambda file: file.write_bytes(file.read_bytes()[:-9]), "is damaged"),
        ("dataset.json", Path.unlink, "has no dataset.json"),
        ("train/.shard.00000.mds.x.tmp", Path.touch, "is a stray"),
        ("notes.txt", Path.touch, "is a stray"),
    ],
)
def test_each_damage_is_named(copied, name, damage, told):
    damage(copied / name)
    found = problems(copied)
    assert [file for file, _ in found] == ([name] if told else [])
    assert not told or told in found[0][1]


def test_every_bit_of_a_shard_counts(copied):
    name = "validation/shard.00000.mds"
    whole = (copied / name).read_bytes()
    for byte in range(0, len(whole), max(1, len(whole) // 40)):
        flip(byte, byte % 8)(copied / name)
        assert [file for file, _ in problems(copied)] == [name], byte
        (copied / name).write_bytes(whole)


def test_all_broken_files_are_listed(copied):
    flip(-1)(copied / SHARD)
    cut(copied / "train/shard.00000.mds")
    (copied / "tokenizer.json").unlink()
    (copied / "validation/index.json").unlink()
    (copied / "x").touch()
    expected = ["tokenizer.json", "train/shard.00000.mds", SHARD, "validation/index.json", "x"]
    assert [file for file, _ in problems(copied)] == expected
    assert problems(copied, threads=1) == problems(copied, threads=7)


def test_compressed_shards(packed, tmp_path):
    copy = Path(shutil.copytree(packed.path, tmp_path / "copy"))
    name = next((copy / "train").glob("*.zstd")).name
    flip(-1)(copy / "train" / name)
    assert [file for file, _ in problems(copy)] == [f"train/{name}"]
    flip(-1)(copy / "train" / name)
    assert not list(copy.rglob("*.mds"))  # nothing was inflated on the disk
    Shards(DatasetInfo.load(copy), "train").read(np.arange(packed.splits["train"].samples))
    assert problems(copy) == []
    raw = copy / "train" / name.removesuffix(".zstd")
    flip(-1)(raw)
    assert [file for file, _ in problems(copy)] == [f"train/{raw.name}"]


def forge(path: Path, change: Callable[[Path, dict], None]) -> None:
    """Change shard 0 of the validation split and make all checksums right again."""
    index = path / "validation" / "index.json"
    content = json.loads(index.read_text())
    entry = content["shards"][0]
    file = path / "validation" / entry["raw_data"]["basename"]
    change(file, entry)
    data = file.read_bytes()
    entry["raw_data"]["hashes"], entry["raw_data"]["bytes"] = {HASH: file_hash(HASH, data)}, len(data)
    index.write_text(json.dumps(content))
    rewrite(path / "dataset.json", lambda told: told["splits"]["validation"].update(index=checksum(index)))


def test_wrong_content_under_right_checksums(copied):
    def beyond(file: Path, _: dict) -> None:
        data = bytearray(file.read_bytes())
        data[-2:] = (300).to_bytes(2, "little")  # the vocabulary has 300, so 299 is the largest
        file.write_bytes(data)

    forge(copied, beyond)
    name = "validation/shard.00000.mds"
    assert problems(copied) == [(name, "has 1 token ids up to 300, and the vocabulary has 300")]


def test_wrong_counts_under_right_checksums(copied):
    def another_count(file: Path, entry: dict) -> None:
        entry["samples"] += 1

    forge(copied, another_count)
    (description, first), (shard, second) = problems(copied)
    assert (description, shard) == ("dataset.json", "validation/shard.00000.mds")
    assert "says {'samples': " in first
    assert "does not hold the " in second


def test_an_index_of_another_form(copied):
    def another_form(file: Path, entry: dict) -> None:
        entry["column_encodings"] = ["ndarray:uint32:17"]

    forge(copied, another_form)
    ((name, told),) = problems(copied)
    assert (name, "does not describe shards of this dataset" in told) == ("validation/index.json", True)


@pytest.mark.parametrize(
    ("key", "message"), [("tokens", "scored tokens of train"), ("samples", "'samples': "), ("shard_bytes", "'shard_b")]
)
def test_wrong_counts_in_the_description(copied, key, message):
    rewrite(copied / "dataset.json", lambda told: told["splits"]["train"].update({key: 7}))
    ((name, told),) = problems(copied)
    assert (name, message in told) == ("dataset.json", True)


def test_a_description_of_another_tokenizer(copied):
    rewrite(copied / "dataset.json", lambda told: told.update(eos_id=1))
    ((name, told),) = problems(copied)
    assert (name, "says vocab_size, eos_id, dtype (300, 1, 'uint16')" in told) == ("dataset.json", True)


def test_questions_are_checked_against_their_shards(questions, tmp_path):
    copy = Path(shutil.copytree(questions.path, tmp_path / "copy"))
    file = copy / "test.jsonl"
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    row = json.loads(lines[1])
    changed = json.dumps(row | {"target": row["target"] + "0"}) + "\n"
    for content, message in [
        ("".join([lines[0], changed, *lines[2:]]), "row 1 ('"),
        ("".join(lines[1:]), f"has {len(lines) - 1} rows, and the shards have {len(lines)}"),
        (whole[:-9], "cannot be checked"),
    ]:
        file.write_text(content)
        ((name, told),) = problems(copy)
        assert (name, message in told) == ("test.jsonl", True)
    file.unlink()
    assert [name for name, _ in problems(copy)] == ["test.jsonl"]


def test_rows_are_those_of_the_reader(dataset):
    shards = Shards(dataset, "train")
    entry = shards.entries[0]
    raw = (dataset.path / "train" / entry["raw_data"]["basename"]).read_bytes()
    rows = rows_of(raw, entry["samples"], SEQ_LEN + 1, dataset.dtype)
    assert rows.tolist() == shards.read(np.arange(entry["samples"])).tolist()
    assert rows_of(raw, entry["samples"] + 1, SEQ_LEN + 1, dataset.dtype) is None
    assert rows_of(raw, entry["samples"], SEQ_LEN, dataset.dtype) is None
    assert rows_of(raw[:-2], entry["samples"], SEQ_LEN + 1, dataset.dtype) is None
    assert rows_of(b"", 1, SEQ_LEN + 1, dataset.dtype) is None
