"""The range test of learning rates: on curves whose turning points are known, and with a real training."""

import math

import pytest

from mosaic_dist.compare.find_lr import MARGIN, find_lr, judge
from mosaic_dist.errors import UserError
from mosaic_dist.train.metrics import read_metrics
from tests.end_to_end.conftest import python
from tests.launch import ROOT

RATES = [10 ** (-6 + 6 * i / 299) for i in range(300)]


def curve(rate: float) -> float:
    """Falls fastest at 1e-3, is lowest near 10^-1.5, and rises steeply beyond."""
    decades = math.log10(rate)
    return 9 - 3 / (1 + math.exp(-4 * (decades + 3))) + math.exp(8 * (decades + 0.7))


def within(rate: float, expected: float) -> bool:
    """Within a fifth of a decade: what smoothing shifts."""
    return abs(math.log10(rate / expected)) < 0.2


def test_the_points_of_a_curve_are_found():
    lowest = min(RATES, key=curve)
    edge = next(rate for rate in RATES if rate > lowest and curve(rate) > 1.2 * curve(lowest))
    found = judge(RATES, [curve(rate) for rate in RATES])
    assert within(found.steepest, 1e-3)
    assert within(found.lowest, lowest)
    assert found.suggested == found.lowest / MARGIN
    assert found.diverged is not None
    assert within(found.diverged, edge)


def test_a_loss_that_ends_in_nan_has_diverged_there_and_one_that_falls_has_not():
    falling = [9 - math.log10(rate / RATES[0]) for rate in RATES]
    assert judge(RATES, falling).diverged is None
    assert judge(RATES, falling).lowest == RATES[-1]
    assert judge(RATES, [*falling[:-1], math.nan]).diverged == RATES[-2]


def test_a_loss_that_never_falls_is_told():
    with pytest.raises(UserError, match="never fell in 300 steps"):
        judge(RATES, [1 + rate for rate in RATES])


def test_words_that_do_not_fit():
    with pytest.raises(UserError, match="give one recipe"):
        find_lr()
    with pytest.raises(UserError, match=r"--low \(1\) must be less than --high \(0.1\)"):
        find_lr("recipes/sweeps/small.py", low=1.0, high=0.1)


def test_a_real_range(tmp_path, monkeypatch, capsys):
    """Learning rates rise evenly in the logarithm, and the loss of a tiny model turns on the way."""
    monkeypatch.chdir(ROOT)
    data, steps = tmp_path / "data", 40
    python("-m", "data_prep.arithmetic", "--output", data, "--samples", "60", "--high", "9", "--seq_len", "16",
           "--validation_fraction", "0.35")  # fmt: skip
    small = {"vocab_size": 18, "dim": 32, "max_seq_len": 16, "layers.ffn.hidden_dim": 32}
    flags = {f"model.{name}": value for name, value in small.items()} | {"batch_tokens": 64, "micro_batch_size": 4}
    words = {"data": str(data), "output": str(tmp_path / "runs"), "launcher": "python", "data.workers": 0}
    find_lr("recipes/sweeps/small.py", steps=steps, low=1e-5, high=10.0, **words, **flags)
    folder = tmp_path / "runs" / "small_seed0"
    rates = [record["learning_rate"] for record in read_metrics(folder / "metrics.jsonl")]
    assert rates == pytest.approx([10 ** (-5 + 6 * i / (steps - 1)) for i in range(steps)])
    assert "suggested: --optimizer.learning_rate " in capsys.readouterr().out
    assert (folder / "learning_rate.png").read_bytes().startswith(b"\x89PNG")
