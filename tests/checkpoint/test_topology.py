"""Save on any layout, load on any other: 3 sources x 6 targets, and every optimizer from one source.

Of ranks, expert-parallel degree, ZeRO stage, accumulation and precision. On the layout that wrote a checkpoint a run
goes on bit for bit; on another one the state is the same bit for bit, and so are the samples; the losses are but for
rounding.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.tokenizer import train_bpe
from mosaic_dist.optim import Optimizer
from mosaic_dist.spec import kinds
from tests.checkpoint.samples import same_bits
from tests.checkpoint.topology_ranks import (
    BATCH,
    LAST_STEP,
    SAVED_STEP,
    SOURCES,
    STARTS,
    TARGETS,
    VOCAB,
    name_of,
    pairs,
)
from tests.data.conftest import make_documents
from tests.launch import check, run_ranks
from tests.parallel import tiny
from tests.parallel.mixed import Case

DOCUMENTS = 60
SAMPLES = 104
"""Of so many documents: the first epoch ends inside the first step after the save."""
FP32_TOLERANCE = 1e-5
"""Of a loss; sums in another order are off by some 1e-7 a step."""
BF16_TOLERANCE = 5 * 2**-9
"""Of a loss of about 5, whose logits come from numbers that are rounded to 2**-9 of themselves, at least in one run."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all trainings; one start of Python for all worlds, the sources' before the targets'."""
    root, documents = tmp_path_factory.mktemp("topology"), make_documents(DOCUMENTS)
    data, folder = root / "data", root / "trained"
    prepare(documents, train_bpe(documents, VOCAB), data, tiny.LENGTH, validation_fraction=0.0, workers=1)
    sizes = ",".join(str(size) for group in (SOURCES, TARGETS) for size in sorted({case.ranks for case in group}))
    words = ("tests.checkpoint.topology_ranks", sizes, str(folder), str(data))
    check(run_ranks("tests.parallel.forked", 1, *words, timeout=400))
    return folder


def notes(folder: Path) -> list[dict[str, Any]]:
    """A row for each step."""
    rows: list[dict[str, Any]] = json.loads((folder / "notes.json").read_text())
    return rows


def saved(folder: Path, step: int) -> Checkpoint:
    return Checkpoint.open(folder / f"step_{step:08d}")


def id_of(pair: tuple[str, Case, Case]) -> str:
    return name_of(*pair)


def test_the_matrix_spans_what_it_says() -> None:
    for column, values in zip(zip(*TARGETS, strict=True), ({1, 2, 3, 4}, {0, 1, 2, 3}, {1, 2, 3, 4}), strict=False):
        assert set(column) == values
    for cases in (SOURCES, TARGETS):
        assert {case.precision for case in cases} == {"fp32", "bf16"}
        assert len({case.accumulation for case in cases}) == 3
    assert {optimizer for optimizer, _ in STARTS} == kinds(Optimizer).keys()


@pytest.mark.parametrize(("optimizer", "source", "target"), pairs(), ids=map(id_of, pairs()))
def test_the_state_is_the_sources_bit_for_bit(trained: Path, optimizer: str, source: Case, target: Case) -> None:
    """What an engine saves right after it has loaded; its own weights and generators were others."""
    written = saved(trained / name_of(optimizer, source), SAVED_STEP)
    loaded = saved(trained / name_of(optimizer, source, target), SAVED_STEP)
    assert loaded.shapes == written.shapes
    for name in written.shapes:
        assert loaded.kinds(name) == written.kinds(name)
        for kind in written.kinds(name):
            assert same_bits(loaded.read_full(name, kind), written.read_full(name, kind)), (name, kind)
    for rank in range(min(source.ranks, target.ranks)):
        one, other = written.rank_state(rank), loaded.rank_state(rank)
        assert one is not None
        assert other is not None
        assert one.keys() == other.keys()
        assert all(same_bits(one[name], other[name]) for name in one)
    there = {
        "ranks": target.ranks,
        "expert_parallel": target.degree,
        "sequence_parallel": 1,
        "zero_stage": target.stage,
        "precision": target.precision,
        "accumulation": target.accumulation,
        "micro_batch_size": BATCH // target.ranks // target.accumulation,
    }
    counted = written.state["engine"] | {"micro_steps": SAVED_STEP * target.accumulation}
    assert loaded.state == written.state | {"layout": there, "engine": counted}


@pytest.mark.parametrize(("optimizer", "source", "target"), pairs(), ids=map(id_of, pairs()))
def test_training_goes_on_as_if_nothing_had_happened(trained: Path, optimizer: str, source: Case, target: Case) -> None:
    undisturbed = notes(trained / name_of(optimizer, source))[SAVED_STEP:]
    continued = notes(trained / name_of(optimizer, source, target))
    tolerance = FP32_TOLERANCE if source.precision == target.precision == "fp32" else BF16_TOLERANCE
    for one, other in zip(undisturbed, continued, strict=True):
        for key in ("samples", "tokens", "learning_rate"):
            assert other[key] == one[key]
        for key in ("loss", "auxiliary_loss"):
            assert other[key] == pytest.approx(one[key], abs=tolerance, rel=0)


@pytest.mark.parametrize(("optimizer", "layout"), STARTS, ids=[name_of(*start) for start in STARTS])
def test_on_the_layout_that_wrote_it_a_run_goes_on_bit_for_bit(trained: Path, optimizer: str, layout: Case) -> None:
    folders = trained / name_of(optimizer, layout), trained / name_of(optimizer, layout, layout)
    assert notes(folders[1]) == notes(folders[0])[SAVED_STEP:]
    for step in (SAVED_STEP, LAST_STEP):
        one, other = (saved(folder, step).manifest for folder in folders)
        for key in ("files", "tensors", "rank_state", "state"):  # all bytes, by their checksums
            assert one[key] == other[key]


@pytest.mark.parametrize(("optimizer", "layout"), STARTS, ids=[name_of(*start) for start in STARTS])
def test_a_source_takes_every_sample_once_an_epoch_and_learns(trained: Path, optimizer: str, layout: Case) -> None:
    folder = trained / name_of(optimizer, layout)
    rows = notes(folder)
    samples = [sample for row in rows for sample in row["samples"]]
    assert SAVED_STEP * BATCH < SAMPLES < (SAVED_STEP + 1) * BATCH
    assert sorted(samples[:SAMPLES]) == list(range(SAMPLES))
    assert len(set(samples[SAMPLES:])) == len(samples) - SAMPLES == LAST_STEP * BATCH - SAMPLES
    falls = [one["loss"] - other["loss"] for one, other in itertools.pairwise(rows)]
    assert min(falls) > 5 * BF16_TOLERANCE  # a step left out, or made twice, would not pass
    checkpoint = saved(folder, SAVED_STEP)
    (correction,) = (name for name in checkpoint.shapes if checkpoint.kinds(name) == ("buffer",))
    assert len(checkpoint.read_full(correction, "buffer").unique()) > 1
