"""A run whose batch grows, against a plain loop on one process over the same samples, and resumed in the middle."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mosaic_dist.checkpoint import save
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.shards import Shards
from mosaic_dist.data.tokenizer import train_bpe
from mosaic_dist.run import start
from mosaic_dist.spec import SpecError
from tests.checkpoint.samples import SHAPES, cut, random_tensors
from tests.data.conftest import make_documents
from tests.launch import check, run_ranks
from tests.optim.test_batch_ramp import RAMP, run_with
from tests.parallel.tiny import LENGTH, MICRO, OPTIMIZER
from tests.train.ramp_ranks import LAYOUTS, MODEL, RESUMED, SAVED_STEP, VOCAB

BATCHES = (4, 4, 8, 12, 16, 16, 16)
"""Sequences of each step; tests/optim/test_batch_ramp.py says why. Two ranks take 1, 1, 2, 3, 4, 4, 4 micro-batches."""
EXACT = ("loss", "auxiliary_loss", "grad_norm", "learning_rate", "tokens", "samples")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ramp")
    documents = make_documents(60)
    prepare(documents, train_bpe(documents, VOCAB), root / "data", LENGTH, workers=1)
    words = ("tests.train.ramp_ranks", "2,1", str(root), str(root / "data"))
    check(run_ranks("tests.parallel.forked", 1, *words, timeout=400))
    return root


def told(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def rows(folder: Path, name: str) -> list[list[Any]]:
    return [[row[key] for key in EXACT] for row in told(folder, name)["rows"]]


@cache
def plain_loop(data: Path, samples: tuple[tuple[int, ...], ...]) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Losses, auxiliary losses and norms of each step over these rows of the data, and the final weights."""
    shards = Shards(DatasetInfo.load(data), "train", LENGTH)
    model = MODEL.build_initialized(0)
    optimizer = OPTIMIZER.build(OPTIMIZER.groups(model))
    results = []
    for numbers in samples:
        tokens = torch.from_numpy(shards.read(np.array(numbers)).astype(np.int64))
        cross_entropy = auxiliary = 0.0
        for micro in tokens.split(MICRO):
            parts = model(micro[:, :-1], micro[:, 1:])
            micro_batches = len(numbers) // MICRO
            (parts.cross_entropy_sum / (len(numbers) * LENGTH) + parts.auxiliary / micro_batches).backward()
            cross_entropy += parts.cross_entropy_sum.item() / (len(numbers) * LENGTH)
            auxiliary += parts.auxiliary.item() / micro_batches
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad()
        results.append([cross_entropy, auxiliary, norm])
    return results, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_plain_loop(folder, layout):
    found = told(folder, layout)["rows"]
    samples = tuple(tuple(row["samples"]) for row in found)
    results, weights = plain_loop(folder / "data", samples)
    got = torch.tensor([[row[key] for key in ("loss", "auxiliary_loss", "grad_norm")] for row in found])
    torch.testing.assert_close(got, torch.tensor(results), rtol=1e-5, atol=1e-6)
    tensors = load_file(folder / f"{layout}.safetensors")
    masters = {name.removeprefix("master/"): t for name, t in tensors.items() if name.startswith("master/")}
    assert len(masters) > 10
    for name, weight in masters.items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_each_sample_once_and_in_order(folder):
    """The order of a run without a ramp is the same; here it is cut otherwise."""
    found = told(folder, RESUMED)
    assert [len(row["samples"]) for row in found["rows"]] == list(BATCHES)
    assert [row["tokens"] for row in found["rows"]] == [LENGTH * sum(BATCHES[: i + 1]) for i in range(len(BATCHES))]
    assert found["data"]["cursor"] == sum(BATCHES)
    order = [sample for row in found["rows"] for sample in row["samples"]]
    assert len(set(order)) == len(order) == sum(BATCHES)
    for layout in LAYOUTS:
        assert [row["samples"] for row in told(folder, layout)["rows"]] == [row["samples"] for row in found["rows"]]


def test_it_goes_on_bitwise_from_the_middle(folder):
    whole, resumed = told(folder, RESUMED), told(folder, "resumed_2")
    assert rows(folder, "resumed_2") == rows(folder, RESUMED)[SAVED_STEP:]
    assert (resumed["progress"], resumed["data"]) == (whole["progress"], whole["data"])
    got, expected = (load_file(folder / f"{name}.safetensors") for name in ("resumed_2", RESUMED))
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


def test_one_rank_goes_on_with_the_batches_of_two(folder):
    got, expected = rows(folder, "resumed_1"), rows(folder, RESUMED)[SAVED_STEP:]
    for one, other in zip(got, expected, strict=True):
        assert one[3:] == other[3:]  # learning rate, tokens, samples
        assert one[:3] == pytest.approx(other[:3], rel=1e-4)


def test_only_batches_that_lie_ahead_are_asked_of_the_ranks(tmp_path, monkeypatch, capsys):
    """Eight ranks cannot take the first batches of four sequences; those behind the ramp they can."""
    run, where = run_with(RAMP), (None, str(tmp_path), None, None, True)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
    with pytest.raises(SpecError, match=r"batch_ramp.start_tokens: 64 .* 8 ranks"):
        start(run, *where)
    for step, cursor in ((3, 16), (4, 28)):
        (pieces,) = cut(random_tensors(), 1)
        save(tmp_path / "checkpoints", step, pieces, SHAPES, {"data": {"cursor": cursor}}, {})
        if cursor == 16:
            with pytest.raises(SpecError, match="batch_ramp: the run is at a batch of 192"):
                start(run, *where)
    assert start(run, *where) is False
    assert "ramp: the batch grows from 64 tokens" in capsys.readouterr().out
