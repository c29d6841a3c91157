"""The next batch is made while the step runs, and counts only when it was handed out."""

import contextlib
import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from mosaic_dist.data import Data
from mosaic_dist.data.batch import FILLER
from mosaic_dist.data.prefetch import prefetch, read_rows
from mosaic_dist.data.stream import Loader, ValidationBatches
from tests.launch import ROOT


def test_one_item_is_made_ahead_and_no_more():
    made, threads, allowed = [], set(), threading.Semaphore(1)

    def items():
        for number in range(4):
            allowed.acquire()
            threads.add(threading.current_thread().name)
            made.append(number)
            yield number

    ahead = prefetch(items())
    assert next(ahead) == 0
    allowed.release()
    while len(made) < 2:  # nobody asked for it
        time.sleep(0.001)
    allowed.release()
    time.sleep(0.05)
    assert made == [0, 1]
    assert next(ahead) == 1
    allowed.release()
    assert list(ahead) == [2, 3]
    assert len(threads) == 1
    assert threads != {threading.current_thread().name}


def test_an_error_comes_when_its_item_is_asked_for():
    def items():
        yield 1
        yield 2
        raise ValueError("third")

    ahead = prefetch(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(ahead)
    assert list(prefetch(item for item in ())) == []


def test_closing_ends_the_thread():
    before, closed = threading.active_count(), []

    def items():
        try:
            yield from itertools.count()
        finally:
            closed.append(threading.active_count())

    with contextlib.closing(prefetch(items())) as ahead:
        assert next(ahead) == 0
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert closed == [before + 1], "by the thread that made its items"


STUCK = """
import sys, time, numpy
from mosaic_dist.data import prefetch

class Stuck:
    seq_len, dtype, answer_loss = 0, numpy.dtype(numpy.int64), None

    def read(self, samples):
        if samples[0] > 2:
            time.sleep(100)
        return samples[:, None]

prefetch.CLOSING_SECONDS = 0.2
steps = (numpy.array([i]) for i in range(9))
batches = prefetch.prefetch(item for item in prefetch.read_rows(Stuck(), steps, int(sys.argv[1])))
assert [int(next(batches)[0][0]) for _ in range(3)] == [0, 1, 2]
batches.close()
print("closed", flush=True)
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_file_system_that_does_not_answer_holds_up_no_end(workers):
    done = subprocess.run(
        [sys.executable, "-c", STUCK, workers], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")


class Numbers:
    """Samples whose one token is their number; remembers which threads read."""

    seq_len, dtype, answer_loss = 0, np.dtype(np.int64), None

    def __init__(self, broken: int | None = None):
        self.broken, self.threads = broken, set()

    def __len__(self) -> int:
        return 1000

    def read(self, samples: np.ndarray) -> np.ndarray:
        self.threads.add(threading.get_ident())
        if self.broken in samples:
            raise ValueError(f"sample {self.broken}")
        time.sleep(0.001 * float(np.random.default_rng(samples).random()))
        return samples[:, None]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_rows_come_in_order_and_leave_no_threads(workers):
    before, shards = threading.active_count(), Numbers()
    steps = [np.array([i, FILLER, 2 * i]) for i in range(1, 100)]
    read = list(read_rows(shards, steps, workers))
    assert [samples.tolist() for samples, _ in read] == [step.tolist() for step in steps]
    assert [tokens.tolist() for _, tokens in read] == [[[i], [0], [2 * i]] for i in range(1, 100)]
    assert len(shards.threads) == max(workers, 1)
    with contextlib.closing(read_rows(shards, (np.array([i]) for i in itertools.count()), workers)) as rows:
        next(rows)
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_cannot_be_read_is_told_in_its_turn(workers):
    before = threading.active_count()
    rows = read_rows(Numbers(broken=5), (np.array([i]) for i in itertools.count()), workers)
    assert [int(samples[0]) for samples, _ in itertools.islice(rows, 5)] == list(range(5))
    with pytest.raises(ValueError, match="sample 5"):
        next(rows)
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_waiting_for_a_step_hides_the_reading(dataset, monkeypatch, workers):
    """Reading that takes less than the step costs nothing; the cursor counts what was handed out."""
    loader = Loader(Data(workers=workers), dataset, global_batch=8, rank=0, world_size=1, seed=1)
    read, slow_seconds = loader.shards.read, 0.05

    def slow(samples):
        time.sleep(slow_seconds)
        return read(samples)

    monkeypatch.setattr(loader.shards, "read", slow)
    with contextlib.closing(iter(loader)) as batches:
        next(batches)
        waited = 0.0
        for step in range(1, 6):
            assert loader.state()["cursor"] == 8 * step
            time.sleep(4 * slow_seconds)  # the step
            started = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - started
    assert waited < 5 * slow_seconds / 2, "each step waited as long as the reading takes"


@pytest.mark.gpu
def test_batches_on_the_device_are_those_of_the_cpu(dataset):
    data = Data(workers=1, document_mask=True)
    words = {"global_batch": 64, "rank": 0, "world_size": 1, "seed": 1}
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    held_out = {"batch": 5, "rank": 0, "world_size": 1}
    for there, here in (
        (Loader(data, dataset, **words, device=device), Loader(data, dataset, **words)),
        (ValidationBatches(data, dataset, **held_out, device=device), ValidationBatches(data, dataset, **held_out)),
    ):
        for sent, kept in itertools.islice(zip(there, here, strict=True), 50):
            # memory that is given to a later batch too early would change under this work
            busy = torch.randn(1024, 1024, device=device)
            for _ in range(20):
                busy = busy @ busy.clamp(-1, 1)
            for name in ("inputs_BT", "targets_BT", "documents_BT"):
                on_device, on_cpu = getattr(sent, name), getattr(kept, name)
                assert on_device.device == device
                assert torch.equal((on_device + 0 * busy[0, 0].nan_to_num().long()).cpu(), on_cpu)
            assert sent.sample_ids == kept.sample_ids
