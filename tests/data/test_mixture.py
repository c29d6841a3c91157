"""Mixtures: whose turn it is, what may be mixed, and how one is written."""

import itertools
import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from mosaic_dist.data import Data, mixture
from mosaic_dist.data.mixture import MixedOrder, MixtureSource, interleave, mix, shares
from mosaic_dist.data.order import Order
from mosaic_dist.data.settings import Stream, read_data_word, stream_names
from mosaic_dist.data.stream import Loader
from mosaic_dist.errors import UserError
from mosaic_dist.run_spec import Run, differences
from mosaic_dist.spec import SpecError, override
from recipes.t4_moe import run


@pytest.mark.parametrize(
    ("proportions", "expected"),
    [([1.0], [1]), ([0.7, 0.3], [7, 3]), ([2.0, 2.0], [1, 1]), ([0.5, 0.3, 0.2], [5, 3, 2]), ([1e-3, 1], [1, 1000])],
)
def test_proportions_are_taken_as_they_are_written(proportions, expected):
    assert shares(proportions) == expected


def test_proportions_that_never_come_out_even_are_rounded():
    proportions = [1 / 3, 1 / 7, 0.123456789]
    found = shares(proportions)
    assert sum(found) == mixture.ROUND_LIMIT
    whole = sum(map(Fraction, proportions))
    for count, proportion in zip(found, proportions, strict=True):
        assert abs(count - Fraction(proportion) / whole * mixture.ROUND_LIMIT) < 1
    with pytest.raises(UserError, match=r"proportion 1e-05 is less than 1 part in 65,536 of the whole"):
        shares([0.123456789, 1e-5, 3])


@pytest.mark.parametrize(
    "counts", [[1], [7, 3], [1, 1, 1], [5, 3, 2], [1, 1, 1, 1000], [997, 13, 211, 1, 1], [333, 333, 334], [99, 1] * 4]
)
def test_every_prefix_is_within_one_sample_of_the_proportions(counts):
    found, length = interleave(counts).tolist(), sum(counts)
    assert len(found) == length
    seen = [0] * len(counts)
    for position, stream in enumerate(found, 1):
        seen[stream] += 1
        assert all(abs(have * length - position * count) < length for have, count in zip(seen, counts, strict=True))
    assert seen == counts


def test_each_stream_walks_its_own_order():
    sizes, proportions = [np.array([30, 21]), np.array([7]), np.array([400])], [0.25, 0.35, 0.4]
    made = MixedOrder([Order(size, seed=3) for size in sizes], proportions)
    whole = made.take(0, 2000)
    for stream, first in enumerate((0, 51, 58)):
        mine = whole[(whole >= first) & (whole < first + sizes[stream].sum())]
        assert abs(len(mine) - 2000 * proportions[stream]) < 1
        assert mine.tolist() == (Order(sizes[stream], seed=3).take(0, len(mine)) + first).tolist()
    fresh = MixedOrder([Order(size, seed=3) for size in sizes], proportions)
    assert [fresh.take(p, 1)[0] for p in (1999, 0, 777, 51)] == [whole[p] for p in (1999, 0, 777, 51)]
    assert fresh.take(777, 100).tolist() == whole[777:877].tolist()
    for position in (0, 1, 19, 20, 777):
        counted = [np.sum((whole[:position] >= a) & (whole[:position] < b)) for a, b in ((0, 51), (51, 58), (58, 458))]
        assert made.taken(position).tolist() == counted


def loader(corpus, state=None, seed=1) -> Loader:
    return Loader(Data(workers=0), corpus, global_batch=10, rank=0, world_size=1, seed=seed, state=state)


def test_a_mixture_reads_what_its_datasets_hold(dataset, other):
    mixed = mix([
        MixtureSource(name="a", info=dataset, split="train", proportion=3.0),
        MixtureSource(name="b", info=other, split="validation", proportion=1.0),
    ])  # fmt: skip
    made = loader(mixed)
    first = dataset.splits["train"].samples
    singles = [Loader(Data(workers=0), info, global_batch=1, rank=0, world_size=1, seed=1, split=split)
               for info, split in ((dataset, "train"), (other, "validation"))]  # fmt: skip
    rows = [iter(single) for single in singles]
    for batch in itertools.islice(made, 40):
        for number, row_T, target_T in zip(batch.sample_ids, batch.inputs_BT, batch.targets_BT, strict=True):
            expected = next(rows[number >= first])
            assert number - first * (number >= first) == expected.sample_ids[0]
            assert (row_T == expected.inputs_BT[0]).all()
            assert (target_T == expected.targets_BT[0]).all()
    assert made.epochs == {"a": 300 / first, "b": 100 / other.splits["validation"].samples}
    assert made.epochs["b"] > 1


def test_the_state_covers_streams_and_proportions(dataset, other):
    def mixed(**changes):
        first = {"name": "a", "info": dataset, "split": "train", "proportion": 0.5}
        return mix([MixtureSource(**first), MixtureSource(**(first | {"name": "b", "info": other} | changes))])

    state = json.loads(json.dumps(loader(mixed()).state()))
    loader(mixed(name="c"), state)  # names are for people
    for changed, message in (
        (mixed(proportion=0.75), r"proportions was \[1, 1\] and is \[2, 3\]"),
        (mixed(split="validation"), r"split was \['train', 'train'\] and is"),
        (mixed(info=replace(other, splits={"train": dataset.splits["train"]})), "index was"),
        (dataset, "mixing_version was 1 and is None"),
    ):
        with pytest.raises(UserError, match=message):
            loader(changed, state)
    with pytest.raises(UserError, match="seed was 1 and is 2"):
        loader(mixed(), state, seed=2)


@pytest.mark.parametrize("field", ["tokenizer", "vocab_size", "eos_id", "seq_len"])
def test_datasets_that_do_not_fit_are_named(dataset, other, field):
    odd = replace(other, **{field: "0" if field == "tokenizer" else 7})
    with pytest.raises(UserError, match=rf"{dataset.path} and {odd.path} cannot be mixed: their {field} are .* and"):
        mix([MixtureSource(name=info.path.name, info=info, split="train", proportion=1.0) for info in (dataset, odd)])


def test_a_mixture_from_settings(dataset, other):
    streams = [{"path": str(dataset.path), "proportion": 0.8}, {"path": str(other.path), "proportion": 0.2}]
    data = Data(streams=streams, workers=0)
    assert Data.from_yaml(data.to_yaml()) == data
    corpus = data.load()
    assert [(part.name, part.split, part.proportion) for part in corpus.parts] == [
        (dataset.path.name, "train", 0.8), (other.path.name, "train", 0.2)
    ]  # fmt: skip
    assert (corpus.vocab_size, corpus.tokenizer, corpus.eos_id) == (300, dataset.tokenizer, dataset.eos_id)
    for wrong, message in (
        ({"path": "x"}, "path: 'x' is given besides streams"),
        ({"split": "validation"}, "split: 'validation' is given besides streams"),
        ({"streams": [streams[0], streams[0]]}, "streams: .* stands there 2 times"),
        ({"streams": [{"path": "x", "proportion": 0}]}, r"streams\[0\]\.proportion: 0\.0 must be between"),
    ):
        with pytest.raises(SpecError, match=message):
            override(data, wrong)


def test_names_tell_streams_apart():
    def names(*paths: str) -> list[str]:
        return stream_names(tuple(Stream(path=path) for path in paths))

    assert names("a/web", "/x/code/") == ["web", "code"]
    assert names("a/web/v1", "a/code/v1", "s3://b/wiki/v1") == ["web/v1", "code/v1", "wiki/v1"]
    assert stream_names((Stream(path="a"), Stream(path="a", split="extra"))) == ["a/train", "a/extra"]


def test_the_word_of_the_command_line(tmp_path):
    def read(word: str) -> list[tuple[str, float]] | str:
        found = read_data_word(word)
        return found["data.path"] or [(stream["path"], stream["proportion"]) for stream in found["data.streams"]]

    assert read("a=0.7,b=0.3") == [("a", 0.7), ("b", 0.3)]
    assert read("s3://x/a=7,/y/date=2024=3e0,.c=.5") == [("s3://x/a", 7.0), ("/y/date=2024", 3.0), (".c", 0.5)]
    for folder in ("runs/data", "runs/date=2024", "a,b", "s3://bucket/a", "a=b,c=d"):
        assert read(folder) == folder
    (tmp_path / "a=1,b=2").mkdir()
    assert read(str(tmp_path / "a=1,b=2")) == str(tmp_path / "a=1,b=2")
    with pytest.raises(UserError, match=r"--data a=1,b: 'b' does not end in a proportion such as b=0\.5"):
        read("a=1,b")


def test_a_word_replaces_what_the_recipe_says():
    mixed = override(run, read_data_word("a=0.7,b=0.3"))
    assert Run.from_yaml(mixed.to_yaml()) == mixed
    assert override(mixed, read_data_word("c")).data == Data(path="c")
    moved = override(mixed, read_data_word("/elsewhere/a=0.7,/elsewhere/b=0.3") | {"data.cache": "x"})
    assert list(differences(mixed, moved)) == []
    assert list(differences(mixed, override(mixed, read_data_word("a=0.6,b=0.3")))) == [
        "data.streams[0].proportion: 0.7 there, 0.6 here"
    ]
