"""The ledger: whatever the ranks, the workers and the interruptions, the samples are those of the undisturbed order."""

import itertools
import json

import pytest

from mosaic_dist.data import Data
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.mixture import Corpus, MixtureSource, mix
from mosaic_dist.data.stream import Loader

BATCH = 32
PROPORTIONS = (0.7, 0.3)


@pytest.fixture(params=["one dataset", "mixture"])
def corpus(request, dataset, other) -> Corpus:
    if request.param == "one dataset":
        return dataset
    infos = {"a": (dataset, PROPORTIONS[0]), "b": (other, PROPORTIONS[1])}
    return mix([MixtureSource(name=n, info=info, split="train", proportion=p) for n, (info, p) in infos.items()])


def read(corpus: Corpus, ranks: int, workers: int, steps: int, state: dict | None) -> tuple[list[list[int]], dict]:
    """Sample numbers of so many steps, each those of all ranks in order, and the state of rank 0 afterwards."""
    loaders = [
        Loader(Data(workers=workers), corpus, global_batch=BATCH, rank=rank, world_size=ranks, seed=5, state=state)
        for rank in range(ranks)
    ]
    parts = [[batch.sample_ids for batch in itertools.islice(loader, steps)] for loader in loaders]
    assert {len(ids) for rank in parts for ids in rank} == {BATCH // ranks}
    states = [json.loads(json.dumps(loader.state())) for loader in loaders]
    assert all(found == states[0] for found in states)
    return [list(itertools.chain(*step)) for step in zip(*parts, strict=True)], states[0]


def check_epochs(samples: list[int], first: int, size: int) -> None:
    """Every epoch of a stream holds each of its samples once; the last, unfinished one none twice."""
    mine = [sample for sample in samples if first <= sample < first + size]
    for begin in range(0, len(mine), size):
        epoch = mine[begin : begin + size]
        assert len(set(epoch)) == len(epoch)
    assert len(mine) > size, "the ledger should span the end of an epoch"


def sizes(corpus: Corpus) -> list[int]:
    infos = [corpus] if isinstance(corpus, DatasetInfo) else [part.info for part in corpus.parts]
    return [info.splits["train"].samples for info in infos]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_nothing_is_repeated_or_skipped(corpus, ranks, workers):
    streams = sizes(corpus)
    epoch_steps = streams[0] // BATCH  # of the first stream, were it alone
    points = [0, 1, epoch_steps // 2, epoch_steps - 1, epoch_steps + 1, 2 * epoch_steps + 3]  # where a run is resumed
    whole, _ = read(corpus, 1, 0, points[-1], None)
    ledger, state = [], None
    for segment, (begin, end) in enumerate(itertools.pairwise(points)):
        resized = ranks if segment % 2 == 0 else {1: 2, 2: 4, 4: 1}[ranks]
        part, state = read(corpus, resized, workers, end - begin, state)
        ledger += part
        assert state["cursor"] == end * BATCH
    assert ledger == whole
    samples = list(itertools.chain(*ledger))
    first = 0
    for size in streams:
        check_epochs(samples, first, size)
        first += size
    for number, proportion in enumerate(PROPORTIONS if len(streams) > 1 else ()):
        seen = 0
        for position, sample in enumerate(samples, 1):
            seen += (sample >= streams[0]) == number
            assert abs(seen - proportion * position) < 1
