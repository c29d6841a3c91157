"""Shards from a bucket, over real HTTP, with all that can go wrong on the way."""

import collections
import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mosaic_dist.data import Data, mds, remote
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.stream import Loader
from mosaic_dist.errors import UserError
from tests.data.bucket import Bucket
from tests.data.conftest import SEQ_LEN

BATCH = 16
URL = "s3://bucket/sets/mine"


@pytest.fixture
def bucket(dataset, tmp_path, monkeypatch) -> Bucket:
    shutil.copytree(dataset.path, tmp_path / "bucket" / "sets" / "mine")
    served = Bucket(tmp_path / "bucket")
    for name, value in {
        "S3_ENDPOINT_URL": served.url,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mds, "_idle_downloaders", collections.defaultdict(list))  # they know another test's address
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    yield served
    served.shutdown()
    served.server_close()


def settings(tmp_path: Path, **changes) -> Data:
    return Data(**{"path": URL, "cache": str(tmp_path / "cache"), "workers": 0} | changes)


def read(data: Data, corpus, steps: int) -> list:
    made = Loader(data, corpus, global_batch=BATCH, rank=0, world_size=1, seed=1)
    return list(itertools.islice(made, steps))


def left_overs(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_as_from_a_folder(bucket, dataset, tmp_path, workers):
    data = settings(tmp_path, workers=workers)
    info = data.load()
    assert not list((tmp_path / "cache").rglob("*.mds")), "shards come at their first use"
    steps = dataset.splits["train"].samples // BATCH + 1
    expected = read(Data(workers=0), dataset, steps)
    for batch, local in zip(read(data, info, steps), expected, strict=True):
        assert batch.sample_ids == local.sample_ids
        assert (batch.inputs_BT == local.inputs_BT).all()
    shards = [file["raw_data"]["basename"] for file in info.index("train")]
    assert {name: bucket.gets[name] for name in shards} == dict.fromkeys(shards, 1), "by one of the threads"
    assert left_overs(tmp_path / "cache") == []
    bucket.gets.clear()
    again = data.load()  # another job
    assert read(data, again, 3)[2].sample_ids == expected[2].sample_ids
    assert bucket.gets == {"dataset.json": 1}


@pytest.mark.timeout(60)
def test_compressed_shards_come_packed(bucket, documents, tokenizer, tmp_path):
    packed = prepare(documents, tokenizer, tmp_path / "bucket" / "packed", SEQ_LEN, workers=1, compression="zstd")
    data = settings(tmp_path, path="s3://bucket/packed/")
    found = read(data, data.load(), 2)
    expected = read(Data(workers=0), packed, 2)
    assert [batch.inputs_BT.tolist() for batch in found] == [batch.inputs_BT.tolist() for batch in expected]


@pytest.mark.timeout(60)
def test_what_breaks_on_the_way_is_fetched_again(bucket, tmp_path, capsys):
    data = settings(tmp_path, verify="sizes", shuffle=False)
    info = data.load()
    bucket.cuts["shard.00000.mds"], bucket.flips["shard.00000.mds"] = 6, 1  # boto3 itself tries five times
    assert len(read(data, info, 1)) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[0].startswith("warning: fetching s3://bucket/sets/mine/train/shard.00000.mds: ")
    assert told[0].endswith("; again in 0.01 s")
    assert told[1].endswith("shard.00000.mds: it is damaged: its xxh3_64 is wrong; again in 0.02 s")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 2])
def test_what_stays_broken_is_named(bucket, tmp_path, workers):
    data = settings(tmp_path, workers=workers, shuffle=False)
    info = data.load()
    for shard in (bucket.root / "sets" / "mine" / "train").glob("*.mds"):
        content = bytearray(shard.read_bytes())
        content[-3] ^= 4
        shard.write_bytes(content)
    message = r"s3://bucket/sets/mine/train/shard\.\d+\.mds cannot be fetched: "
    with pytest.raises(UserError, match=message + "it is damaged: its xxh3_64 is wrong"):
        read(data, info, 1)
    shutil.rmtree(bucket.root / "sets" / "mine" / "train")
    bucket.gets.clear()
    started = time.monotonic()
    with pytest.raises(UserError, match=message + "ClientError: Object s3://.* not found"):
        read(data, info, 1)
    assert time.monotonic() - started < 20
    assert not list((tmp_path / "cache").rglob("*.mds"))
    assert left_overs(tmp_path / "cache") == []


@pytest.mark.timeout(60)
def test_descriptions_are_proven_before_they_are_kept(bucket, tmp_path):
    place = bucket.root / "sets" / "mine"
    for name, message in (
        ("dataset.json", r"mine/dataset\.json cannot be fetched: it describes no dataset \(JSONDecodeError"),
        ("tokenizer.json", r"mine/tokenizer\.json cannot be fetched: .*"),
        (
            "tokenizer_config.json",
            r"tokenizer_config\.json cannot be fetched: it is not the one that dataset\.json describes",
        ),
        ("train/index.json", r"train/index\.json cannot be fetched: it is not the one that dataset\.json describes"),
    ):
        whole = (place / name).read_bytes()
        (place / name).write_bytes(whole[:-9])
        with pytest.raises(UserError, match=message):
            settings(tmp_path).load()
        (place / name).unlink()
        with pytest.raises(UserError, match=rf"{name.replace('.', '.')} cannot be fetched: ClientError: .* not found"):
            settings(tmp_path).load()
        (place / name).write_bytes(whole)
    assert settings(tmp_path).load().splits.keys() == {"train", "validation"}


def test_a_dataset_that_was_prepared_anew_is_another_one(bucket, documents, tokenizer, tmp_path):
    data = settings(tmp_path, shuffle=False)
    first = data.load()
    read(data, first, 1)
    shutil.rmtree(bucket.root / "sets" / "mine")
    prepared = prepare(documents[1:], tokenizer, bucket.root / "sets" / "mine", SEQ_LEN, workers=1)
    second = data.load()
    assert first.path != second.path
    expected = read(Data(workers=0, shuffle=False), prepared, 1)[0]
    assert (read(data, second, 1)[0].inputs_BT == expected.inputs_BT).all()
    assert read(data, first, 1)[0].sample_ids  # what an older job uses is still there


DOWNLOADING = """
import sys
from mosaic_dist.data import Data
from mosaic_dist.data.stream import Loader

data = Data(path=sys.argv[1], cache=sys.argv[2], workers=0, shuffle=False)
corpus = data.load()
print("reading", flush=True)
next(iter(Loader(data, corpus, global_batch=16, rank=0, world_size=1, seed=1)))
"""


@pytest.mark.timeout(90)
def test_a_job_that_is_killed_in_the_middle_of_a_shard_hinders_nobody(bucket, tmp_path):
    data = settings(tmp_path, shuffle=False)
    corpus = data.load()
    names = [file["raw_data"]["basename"] for file in corpus.index("train")]
    bucket.stalls = dict.fromkeys(names, 60.0)
    command = [sys.executable, "-c", DOWNLOADING, URL, data.cache]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while not any(bucket.gets[name] for name in names):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    bucket.stalls = {}
    started = time.monotonic()
    assert len(read(data, corpus, 2)) == 2
    assert time.monotonic() - started < 10


def test_half_fetched_files_are_swept_after_a_day(bucket, tmp_path):
    data = settings(tmp_path)
    folder = data.load().path
    for name, age_seconds in (("old", 2 * remote.STALE_SECONDS), ("new", 0)):
        left = folder / "train" / f".shard.{name}{remote.ASIDE}"
        left.mkdir()
        (left / "shard").write_bytes(b"half")
        os.utime(left, (time.time() - age_seconds,) * 2)
    data.load()
    assert left_overs(tmp_path / "cache") == [f".shard.new{remote.ASIDE}"]


def test_places_that_cannot_be(dataset, tmp_path):
    with pytest.raises(UserError, match=rf"{URL} is fetched as it is used: give --data\.cache DIR"):
        settings(tmp_path, cache="").load()
    with pytest.raises(UserError, match=r"nothing here fetches ftp://host/x/dataset\.json: known are .*s3://"):
        settings(tmp_path, path="ftp://host/x").load()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache: .*/file cannot be used"):
        settings(tmp_path, cache=str(tmp_path / "file")).load()
    mounted = settings(tmp_path, path=f"file://{dataset.path}")
    assert isinstance(dataset, DatasetInfo)
    assert read(mounted, mounted.load(), 1)[0].sample_ids == read(Data(workers=0), dataset, 1)[0].sample_ids
    with pytest.raises(UserError, match=r"file:///nowhere/dataset\.json cannot be fetched: FileNotFoundError"):
        settings(tmp_path, path="file:///nowhere").load()
