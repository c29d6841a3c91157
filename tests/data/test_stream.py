import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mosaic_dist.data import Data, order
from mosaic_dist.data.batch import FILLER
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.order import Order
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.shards import Shards
from mosaic_dist.data.stream import Loader, ValidationBatches
from mosaic_dist.errors import UserError
from mosaic_dist.targets import IGNORE_INDEX
from tests.data.conftest import SEQ_LEN, children

BATCH = 8


def loader(info, rank=0, world_size=1, workers=0, seed=1, global_batch=BATCH, state=None, **data) -> Loader:
    data_spec = Data(workers=workers, **data)
    return Loader(data_spec, info, global_batch=global_batch, rank=rank, world_size=world_size, seed=seed, state=state)


def take(batches, count) -> list:
    return list(itertools.islice(batches, count))


def flat(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


def ids(batches) -> list[list[int]]:
    return [batch.sample_ids for batch in batches]


def test_ledger_every_sample_once_per_epoch(dataset):
    samples = dataset.splits["train"].samples
    steps = take(loader(dataset), 3 * samples // BATCH + 1)
    seen = [sample for batch in steps for sample in batch.sample_ids]
    epochs = [seen[i * samples : (i + 1) * samples] for i in range(3)]
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != sorted(epochs[0])


def test_content_of_batches(dataset):
    shards = Shards(dataset, "train")
    batch = next(iter(loader(dataset)))
    expected = torch.from_numpy(shards.read(np.array(batch.sample_ids)).astype(np.int64))
    assert batch.inputs_BT.dtype == batch.targets_BT.dtype == torch.int64
    assert torch.equal(batch.inputs_BT, expected[:, :-1])
    assert torch.equal(batch.targets_BT, expected[:, 1:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_steps(dataset, world_size):
    steps = dataset.splits["train"].samples // BATCH + 5  # across the epoch's end
    whole = ids(take(loader(dataset), steps))
    ranks = [ids(take(loader(dataset, rank, world_size), steps)) for rank in range(world_size)]
    assert [flat(parts) for parts in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_exactly(dataset, workers):
    steps = dataset.splits["train"].samples // BATCH + 6
    whole = ids(take(loader(dataset), steps))
    for done in (0, 1, 7, steps - 3):
        first = loader(dataset, workers=workers)
        head = ids(take(first, done))  # the workers have read further ahead than what was handed out
        state = json.loads(json.dumps(first.state()))
        assert state["cursor"] == done * BATCH
        rest = ids(take(loader(dataset, workers=workers, state=state), steps - done))
        assert head + rest == whole
    resized = loader(dataset, global_batch=2 * BATCH, state=state)
    assert flat(ids(take(resized, 1))) == flat(whole[-3:-1])


def test_iterating_again_goes_on(dataset):
    one = loader(dataset)
    whole = ids(take(loader(dataset), 6))
    assert ids(take(one, 2)) + ids(take(one, 4)) == whole


def test_the_global_generator_is_left_alone(dataset):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(loader(dataset), 2)
    list(ValidationBatches(Data(workers=0), dataset, batch=4, rank=0, world_size=1))
    assert torch.equal(torch.rand(1), expected)


def test_changed_order_is_refused(dataset, tokenizer, documents, tmp_path):
    state = loader(dataset).state()
    for other, message in (
        ({"seed": 2}, "seed was 1 and is 2"),
        ({"shuffle": False}, "shuffle was True and is False"),
        ({"seq_len": 8}, "seq_len was 16 and is 8"),
        ({"split": "validation"}, "split was 'train' and is 'validation'"),
    ):
        with pytest.raises(UserError, match=message):
            loader(dataset, state=state, **other)
    changed = prepare(documents[1:], tokenizer, tmp_path / "set", SEQ_LEN, workers=1)
    with pytest.raises(UserError, match=r"index was '.*' and is '"):
        loader(changed, state=state)


def test_without_shuffle_and_with_shorter_sequences(dataset):
    assert ids(take(loader(dataset, shuffle=False), 2)) == [list(range(8)), list(range(8, 16))]
    whole = Shards(dataset, "train").read(np.arange(5))
    parts = Shards(dataset, "train", seq_len=4).read(np.arange(20))
    assert (parts[:, :-1].reshape(5, 16) == whole[:, :-1]).all()
    assert (parts[:, 1:].reshape(5, 16) == whole[:, 1:]).all()
    samples = 4 * dataset.splits["train"].samples
    assert sorted(flat(ids(take(loader(dataset, seq_len=4, global_batch=samples), 1)))) == list(range(samples))
    with pytest.raises(UserError, match=r"seq_len \(5\) must divide .* \(16\)"):
        loader(dataset, seq_len=5)


def test_chapters_cover_an_epoch(monkeypatch):
    monkeypatch.setattr(order, "CHAPTER_SAMPLES", 100)
    sizes = np.array([40, 60, 7, 300, 1, 90, 33])
    made = Order(sizes, seed=3)
    epoch = made.take(531, 531)
    assert sorted(epoch) == list(range(531))
    fresh = Order(sizes, seed=3)
    assert [fresh.take(p, 1)[0] for p in (600, 531, 1061, 777)] == [epoch[p - 531] for p in (600, 531, 1061, 777)]
    assert (Order(sizes, seed=4).take(531, 531) != epoch).any()
    crossing = Order(sizes, seed=3).take(500, 100)
    assert crossing.tolist() == [*Order(sizes, seed=3).take(500, 31), *epoch[:69]]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (3, 0)])
def test_validation_sees_each_sample_once(dataset, world_size, workers):
    samples = dataset.splits["validation"].samples
    parts = [
        ValidationBatches(Data(workers=workers), dataset, batch=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    ranks = [list(part) for part in parts]
    assert {len(batches) for batches in ranks} == {-(-samples // (5 * world_size))} == {len(part) for part in parts}
    assert {tuple(batch.inputs_BT.shape) for batches in ranks for batch in batches} == {(5, SEQ_LEN)}
    seen = [sample for batches in ranks for batch in batches for sample in batch.sample_ids]
    assert sorted(sample for sample in seen if sample != FILLER) == list(range(samples))
    for batch in itertools.chain(*ranks):
        filler = torch.tensor(batch.sample_ids) == FILLER
        assert ((batch.targets_BT == IGNORE_INDEX).all(1) == filler).all()
        assert batch.inputs_BT.min() >= 0
    assert ids(parts[0]) == ids(ranks[0])  # can be iterated again


@pytest.mark.parametrize("limit", [1, 7, 60])
def test_limited_validation_takes_its_samples_evenly_on_every_layout(dataset, limit):
    samples = dataset.splits["validation"].samples

    def numbers(seed: int, batch: int = 1, world_size: int = 1) -> list[int]:
        ranks = [
            ValidationBatches(
                Data(workers=0), dataset, batch=batch, rank=rank, world_size=world_size, limit=limit, seed=seed
            )
            for rank in range(world_size)
        ]
        return sorted(sample for rank in ranks for sample in flat(ids(rank)) if sample != FILLER)

    for seed in range(3):
        found = numbers(seed)
        assert [sample * limit // samples for sample in found] == list(range(limit))  # one of each equal part
        assert numbers(seed, batch=5) == numbers(seed, batch=3, world_size=2) == found
    assert len({tuple(numbers(seed)) for seed in range(20)}) > 1


def test_fillers_of_a_limited_validation_leave_the_inputs_alone(dataset):
    single = [ValidationBatches(Data(workers=0), dataset, batch=1, rank=r, world_size=2, limit=3) for r in (0, 1)]
    last = [list(part)[-1] for part in single]
    assert [batch.sample_ids[0] == FILLER for batch in last] == [False, True]
    assert min(int(batch.inputs_BT.min()) for batch in last) >= 0


@pytest.fixture
def copy(dataset, tmp_path) -> DatasetInfo:
    shutil.copytree(dataset.path, tmp_path / "copy")
    return DatasetInfo.load(tmp_path / "copy")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bit_flip_is_named(copy, workers):
    shard = copy.path / "train" / "shard.00001.mds"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 4
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"^shard .*train/shard\.00001\.mds is damaged: its xxh3_64 is wrong"):
        take(loader(copy, workers=workers), copy.splits["train"].samples // BATCH)
    take(loader(copy, workers=workers, verify="sizes"), 2)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("workers", [0, 2])
def test_missing_and_truncated_shards_are_named(copy, workers):
    shard = copy.path / "train" / "shard.00002.mds"
    running = loader(copy, workers=workers)
    os.truncate(shard, 100)
    with pytest.raises(UserError, match=r"shard\.00002\.mds has 100 bytes, the index says"):
        loader(copy, workers=workers)
    with pytest.raises(UserError, match=r"shard\.00002\.mds has 100 bytes, the index says"):
        take(running, copy.splits["train"].samples // BATCH)  # damaged after the start
    shard.unlink()
    with pytest.raises(UserError, match=r"shard\.00002\.mds cannot be read \(No such file"):
        loader(copy, workers=workers)
    running = loader(copy, workers=workers, split="validation")
    shutil.rmtree(copy.path / "validation")
    with pytest.raises(UserError, match=r"validation/shard\.\d+\.mds cannot be read"):
        take(running, 1)


KILLED = """
import sys
from mosaic_dist.data import Data
from mosaic_dist.data.stream import Loader

data = Data(path=sys.argv[1], workers=2)
for batch in Loader(data, data.load(), global_batch=8192, rank=0, world_size=1, seed=1):
    print("under way", flush=True)
"""


def test_two_jobs_and_a_kill_leave_nothing_behind(dataset):
    """Reading starts no process: one that is forked while other threads work can wait for ever for a lock of theirs."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, str(dataset.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "under way\n"
        assert children(process.pid) == []
        assert len(take(loader(dataset, workers=2), 5)) == 5  # another job at the same time
        process.kill()
    assert not [name for name in os.listdir("/dev/shm") if name.endswith("_locals")], "streaming's shared memory"
    assert len(take(loader(dataset, workers=2), 5)) == 5


def test_descriptions_that_do_not_belong_together(copy, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no dataset at .*tokenize_to_mds"):
        DatasetInfo.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no dataset\.json"):
        DatasetInfo.load(tmp_path)
    with pytest.raises(UserError, match="no data: give --data"):
        Data().load()
    with pytest.raises(UserError, match="has no split 'test'; it has: train, validation"):
        loader(copy, split="test")
    tokenizer_file = copy.path / "tokenizer.json"
    content = json.loads(tokenizer_file.read_text())
    content["model"]["vocab"]["extra"] = 300
    tokenizer_file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the tokenizer and the data of .* disagree"):
        DatasetInfo.load(copy.path)
    tokenizer.save(copy.path)
    index = copy.path / "train" / "index.json"
    index.write_text(index.read_text() + " ")
    with pytest.raises(UserError, match=r"train/index\.json is not the one"):
        DatasetInfo.load(copy.path)
    index.unlink()
    with pytest.raises(UserError, match=r"train/index\.json is missing"):
        DatasetInfo.load(copy.path)
    (copy.path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        DatasetInfo.load(copy.path)


def test_shares_must_be_equal(dataset):
    with pytest.raises(UserError, match=r"global_batch \(8 samples\) must divide by world_size \(3\)"):
        loader(dataset, world_size=3)
