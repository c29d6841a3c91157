"""Spikes of the loss: the judge by hand; whole runs on bad data against plain loops that pass the data over."""

import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.tokenizer import train_bpe
from mosaic_dist.optim import Spikes
from mosaic_dist.train.plot import spikes_of
from mosaic_dist.train.spikes import returns_in_a_row
from mosaic_dist.train.trainer import Progress
from tests.launch import check, run_ranks
from tests.train.spike_ranks import BAD, BATCH, LENGTH, LIMIT, SAVED, STEPS, VOCAB

STAGES = {1: ("0",), 2: ("1", "2", "3")}
"""Of ZeRO, by the number of ranks."""
EXACT = ("step", "tokens", "loss", "auxiliary_loss", "learning_rate", "grad_norm", "skipped", "epoch", "rewinds")


def story(records: list[dict]) -> list[dict]:
    """What must be the same, bit for bit, in two runs of one experiment."""
    return [{key: record.get(key) for key in EXACT} for record in records]


def run_stages(ranks: int, make_folder: Callable[[str], Path]) -> list[dict]:
    """What each of so many ranks saw, and the text of the first."""
    data, output = make_folder("spikes") / "data", make_folder("runs")
    documents = 200 * ["alpha beta gamma delta epsilon zeta eta theta iota kappa lambda"]
    tokenizer = train_bpe([*documents, "x y z 0123 hello world foo bar baz"], VOCAB)
    prepare(documents, tokenizer, data, LENGTH, validation_fraction=0.1, workers=1)
    text = check(run_ranks("tests.train.spike_ranks", ranks, str(data), str(output), *STAGES[ranks], timeout=550))
    seen = [json.loads((output / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
    seen[0]["text"] = text
    return seen


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict]:
    return run_stages(1, tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    return run_stages(2, tmp_path_factory.mktemp)


def test_a_skipped_spike_is_as_if_it_had_not_been(alone):
    seen = alone[0]["0"]
    assert seen["skip"]["digest"] == seen["loop that skips"]["digest"]
    assert seen["skip"]["cursor"] == STEPS * BATCH
    records = seen["skip"]["records"]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    spikes = [record for record in records if "spike_threshold" in record]
    assert [record["step"] for record in spikes] == [number + 1 for number in BAD]
    assert all(record["skipped"] and record["loss"] > record["spike_threshold"] for record in spikes)
    assert [record["loss"] for record in records if not record["skipped"]] == seen["loop that skips"]["losses"]


@pytest.mark.parametrize(("ranks", "stage"), [("alone", "0"), ("both", "1"), ("both", "2"), ("both", "3")])
def test_a_run_that_goes_back_ends_as_one_that_never_saw_the_data(ranks, stage, request):
    """The first spike comes before the first checkpoint, and is skipped; for the others the run goes back to it."""
    told = request.getfixturevalue(ranks)
    for seen in told:
        run, loop = seen[stage]["rewind"], seen[stage]["loop that goes back"]
        assert run["digest"] == loop["digest"]
        assert run["cursor"] == (BAD[-1] + 1 + STEPS - SAVED) * BATCH
    main = told[0]
    records, losses = main[stage]["rewind"]["records"], main[stage]["loop that goes back"]["losses"]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records if "spike_threshold" in record] == [BAD[0] + 1]
    assert [record["loss"] for record in records if not record["skipped"]] == losses
    (first,) = [record for record in records if "rewinds" in record]
    assert first["step"] == SAVED + 1
    assert [(rewind["step"], rewind["back_to_step"]) for rewind in first["rewinds"]] == [(BAD[1] + 1, SAVED)] * 2
    assert all(rewind["loss"] > rewind["threshold"] for rewind in first["rewinds"])
    assert "its update is left out, as there is no checkpoint to go back to yet" in main["text"]
    for number in BAD[1:]:
        assert f"samples {SAVED * BATCH} to {(number + 1) * BATCH - 1} are passed over" in main["text"]


@pytest.mark.parametrize("name", ["went on behind", "went on before", "went on stopped"])
def test_a_run_that_is_stopped_around_its_spikes_goes_on_bitwise(both, name):
    """Saved after the spikes; crashed before that save, and so back before the spikes; told to stop in the first."""
    for seen in both:
        undisturbed, went_on = seen["3"]["rewind"], seen["3"][name]
        for key in ("digest", "cursor", "progress"):
            assert went_on[key] == undisturbed[key]
        assert story(went_on["records"]) == story(undisturbed["records"])
        assert seen["3"]["stopped"]["step"] == SAVED


def test_spikes_without_end_end_the_run_on_all_ranks(both):
    for action, step in (("skip", BAD[1] + LIMIT), ("rewind", SAVED + 1)):
        errors = [seen["3"][f"endless {action}"]["error"] for seen in both]
        assert errors[0] == errors[1]
        assert errors[0].startswith(f"step {step}: loss ")
        assert f"{LIMIT}. time in a row, and spikes.limit is {LIMIT}" in errors[0]
        assert f"ends at sample {(BAD[1] + LIMIT) * BATCH}. " in errors[0]


def by_hand(losses: list[float], spikes: Spikes) -> list[bool]:
    """Which losses are spikes, written down plainly: sort, take the middle, twice."""

    def middle(values: list[float]) -> float:
        ordered = sorted(values)
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    learnt, found = [], []
    for loss in losses:
        recent = learnt[-spikes.window_steps :]
        is_spike = False
        if len(learnt) >= spikes.window_steps:
            centre = middle(recent)
            is_spike = loss > centre + spikes.deviations * 1.4826 * middle([abs(x - centre) for x in recent])
        found.append(is_spike)
        learnt += [] if is_spike else [loss]
    return found


@pytest.mark.parametrize("window", [4, 7])
def test_the_judge(window):
    generator, spikes = random.Random(window), Spikes(action="skip", deviations=4.0, window_steps=window)
    losses = [9 * 0.97**i + generator.gauss(0, 0.05) for i in range(200)]
    for i in (3, 50, 51, 120):
        losses[i] += 3.0
    recent, found = [], []
    for loss in losses:
        found.append(loss > spikes.threshold(recent))
        recent = recent if found[-1] else spikes.remember(recent, loss)
        assert len(recent) <= window
    assert found == by_hand(losses, spikes)
    assert {50, 51, 120} <= {i for i, is_spike in enumerate(found) if is_spike}
    assert not found[3]  # the window was not full yet


def test_what_the_judge_does_not_judge():
    steady = [2.0, 2.1, 1.9, 2.0, 2.05]
    assert Spikes(action="skip", window_steps=5).threshold(steady) == pytest.approx(2.0 + 6 * 1.4826 * 0.05)
    assert Spikes(action="skip", window_steps=6).threshold(steady) == math.inf
    assert Spikes(window_steps=5).threshold(steady) == math.inf
    assert Spikes(window_steps=5).remember([], 2.0) == []
    assert Spikes(action="skip", window_steps=5).threshold(5 * [2.0]) == math.inf  # no deviation, no scale


def test_the_estimate_is_the_standard_deviation_of_normal_losses():
    losses = statistics.NormalDist(3.0, 0.2).samples(100_000, seed=1)
    assert Spikes(action="skip", deviations=2.0, window_steps=100_000).threshold(losses) == pytest.approx(3.4, abs=0.01)


def test_returns_in_a_row():
    progress = Progress(rewinds=[{"back_to_step": step} for step in (8, 4, 8, 8)])
    assert [returns_in_a_row(progress, step) for step in (8, 4)] == [2, 0]


def test_spikes_are_marked_where_they_were_or_where_the_run_went_back_to():
    records = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 9.0, "spike_threshold": 4.0},
        {"step": 3, "loss": 2.0, "rewinds": [{"loss": 7.0}, {"loss": 8.0}]},
    ]
    assert spikes_of([10, 20, 30], records) == [(20, 9.0), (30, 7.0), (30, 8.0)]
