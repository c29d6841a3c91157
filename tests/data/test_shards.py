"""Rows from shards, beside streaming's own reader, and indexes that do not describe them."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from streaming.base.format import reader_from_json

from mosaic_dist.data import mds
from mosaic_dist.data import shards as shards_module
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.shards import Joined, Shards
from mosaic_dist.errors import UserError
from mosaic_dist.files import checksum
from tests.data.conftest import SEQ_LEN


@pytest.fixture(scope="module", params=[None, "zstd:3"])
def prepared(request, documents, tokenizer, tmp_path_factory) -> DatasetInfo:
    output = tmp_path_factory.mktemp("shards") / "set"
    return prepare(
        documents, tokenizer, output, SEQ_LEN, workers=1, shard_bytes=SEQ_LEN * 2 * 50, compression=request.param
    )


def test_rows_are_those_of_streamings_reader(prepared, monkeypatch):
    monkeypatch.setattr(shards_module, "OPEN_FILES", 3)
    monkeypatch.delattr(mds, "_streaming")  # reading does not call it
    made = Shards(prepared, "train")
    numbers = np.random.default_rng(0).permutation(len(made))
    rows = made.read(numbers)  # inflates what is compressed
    index = json.loads((prepared.path / "train" / "index.json").read_text())
    readers = [reader_from_json(str(prepared.path), "train", entry) for entry in index["shards"]]
    expected = np.concatenate([[reader.get_item(i)["tokens"] for i in range(len(reader))] for reader in readers])
    assert len(readers) > 3
    assert rows.dtype == expected.dtype
    assert (rows == expected[numbers]).all()
    short = Shards(prepared, "train", seq_len=4)
    assert (short.read(4 * numbers + 2) == expected[numbers, 8:13]).all()
    descriptors = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd.isdigit()
                   if Path(f"/proc/self/fd/{fd}").exists()]  # fmt: skip
    assert sum(str(prepared.path) in name for name in descriptors) == 6  # three of each


def test_many_threads_read_more_files_than_are_open(prepared, monkeypatch):
    """Each shard is checked once, and none is closed while a thread still reads from it."""
    checked = []
    make_ready = Shards._make_ready
    monkeypatch.setattr(Shards, "_make_ready", lambda self, entry: (checked.append(id(entry)), make_ready(self, entry)))
    expected = Shards(prepared, "train", hashes=False).read(np.arange(prepared.splits["train"].samples))
    monkeypatch.setattr(shards_module, "OPEN_FILES", 1)
    checked.clear()
    made = Shards(prepared, "train")
    orders = [np.random.default_rng(i).permutation(len(made)) for i in range(8)]
    with ThreadPoolExecutor(8) as threads:
        for order, rows in zip(orders, threads.map(made.read, orders), strict=True):
            assert (rows == expected[order]).all()
    assert len(checked) == len(set(checked)) == prepared.splits["train"].shards
    assert len(made._opened) == 1


def test_joined_rows_are_numbered_one_after_the_other(dataset, other):
    parts = [Shards(dataset, "train"), Shards(other, "train"), Shards(other, "validation")]
    joined = Joined(parts)
    expected = np.concatenate([part.read(np.arange(len(part))) for part in parts])
    numbers = np.random.default_rng(0).permutation(len(joined))
    assert len(joined) == sum(map(len, parts))
    assert (joined.read(numbers) == expected[numbers]).all()


@pytest.fixture
def copy(dataset, tmp_path) -> DatasetInfo:
    shutil.copytree(dataset.path, tmp_path / "copy")
    return DatasetInfo.load(tmp_path / "copy")


def rewrite(info: DatasetInfo, change) -> DatasetInfo:
    """The dataset with another index, to which its dataset.json is made to fit."""
    file = info.path / "train" / "index.json"
    file.write_text(change(file.read_text()))
    description = info.path / "dataset.json"
    told = json.loads(description.read_text())
    del told["xxh3_128"]
    told["splits"]["train"]["index"] = checksum(file)
    description.write_text(json.dumps(told))
    return DatasetInfo.load(info.path)


def edited(**changes):
    def change(text: str) -> str:
        index = json.loads(text)
        index["shards"][1] |= changes
        return json.dumps(index)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:100], "JSONDecodeError"),
        (lambda text: "[]", "TypeError: list indices"),
        (lambda text: '{"version": 2, "shards": []}', "it names no shards"),
        (lambda text: text.replace('"samples"', '"sample"'), "KeyError: 'samples'"),
        (edited(column_encodings=["pkl"]), r"encodings, sizes\) are .*pkl"),
        (edited(version=3), "are \\(3, "),
        (edited(samples=0), "0 samples"),
        (edited(raw_data={"basename": "../x", "bytes": 9, "hashes": {"xxh3_64": ""}}), "a file is told as .*\\.\\./x"),
        (edited(raw_data={"basename": "x", "bytes": 9, "hashes": {}}), "a file is told as"),
    ],
)
def test_a_malformed_index_is_named(copy, change, message):
    info = rewrite(copy, change)
    with pytest.raises(UserError, match=rf"train/index\.json does not describe shards of this dataset \(.*{message}"):
        Shards(info, "train")


def test_an_index_of_other_numbers_of_rows(copy):
    info = rewrite(copy, lambda text: text.replace('"samples": ', '"samples": 1'))
    made = Shards(info, "train")
    with pytest.raises(UserError, match=r"shard\.00000\.mds is damaged: its head does not tell \d+ rows of 34 bytes"):
        made.read(np.array([3]))


def test_a_shard_that_is_cut_while_it_is_open(copy):
    made = Shards(copy, "train")
    made.read(np.array([0]))
    os.truncate(copy.path / "train" / "shard.00000.mds", 300)
    with pytest.raises(UserError, match=r"shard\.00000\.mds was cut while it was read"):
        made.read(np.arange(40))


def test_a_description_of_another_length_is_refused(copy):
    with pytest.raises(UserError, match=r"encodings, sizes\) are .*ndarray:uint16:17.* not .*ndarray:uint16:33"):
        Shards(replace(copy, seq_len=32), "train")
