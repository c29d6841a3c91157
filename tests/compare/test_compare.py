"""Variants beside each other, against means, deviations and interpolations by hand."""

import math
import re
import statistics

import pytest

from mosaic_dist.compare.compare import compare
from mosaic_dist.compare.history import read_history
from mosaic_dist.compare.measures import compare_variants, group, smoothed
from mosaic_dist.errors import UserError
from mosaic_dist.model import count_parameters, flops_per_token
from mosaic_dist.spec import override
from recipes.sweeps.small import run as small
from tests.compare.folders import BATCH, record, write_run

WIDE = {"model__layers__ffn__hidden_dim": 768}


def losses(seed: int, start: float) -> list[float]:
    return [start - 0.1 * i + 0.01 * seed * i for i in range(1, 21)]


@pytest.fixture
def runs(tmp_path):
    """Two variants of two seeds; the wide one takes longer, and one of its runs ended early."""
    for seed in (0, 1):
        for name, changes, seconds in (("narrow", {}, 1.0), ("wide", WIDE, 3.0)):
            records = [
                record(i, loss, seconds, memory_bytes=2**20 * (i + 100 * seed))
                for i, loss in enumerate(losses(seed, 6.0 if name == "narrow" else 5.0), 1)
            ]
            records[9] |= {"validation_loss": 4.0 + seed + (name == "wide")}
            kept = records[:10] if (name, seed) == ("wide", 1) else records
            write_run(tmp_path / "runs" / f"{name}_seed{seed}", kept, seed=seed, **changes)
    return tmp_path / "runs"


def stories(runs):
    return [read_history(path) for path in sorted(runs.iterdir())]


def average(values: list[float], half_life: float) -> list[float]:
    """The weighted mean of the past, written out."""
    out = []
    for i in range(len(values)):
        weights = [0.5 ** ((i - j) / half_life) for j in range(i + 1)]
        out.append(sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights))
    return out


def at(point: float, xs: list[float], ys: list[float]) -> float:
    """On the straight line between neighbours."""
    i = next(i for i in range(1, len(xs)) if xs[i] >= point)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (point - xs[i - 1]) / (xs[i] - xs[i - 1])


def test_points_are_the_largest_that_all_reached(runs):
    comparison = compare_variants(group(stories(runs)))
    assert comparison.points["tokens"] == 10 * BATCH
    assert comparison.points["time"] == 20.0  # the narrow ones; the wide one that ended early took 30 s
    narrow_flops = flops_per_token(small.model, 256) * 20 * BATCH
    wide = override(small.model, {"layers.ffn.hidden_dim": 768})
    assert comparison.points["flops"] == pytest.approx(min(narrow_flops, flops_per_token(wide, 256) * 10 * BATCH))


def test_means_and_spreads_are_what_one_gets_by_hand(runs):
    comparison = compare_variants(group(stories(runs)))
    assert [variant.name for variant in comparison.variants] == ["narrow", "wide"]
    narrow, wide = comparison.variants
    assert comparison.is_validated
    final = comparison.final(wide)
    assert (final.mean, final.n) == (5.5, 2)
    assert final.deviation == pytest.approx(math.sqrt(0.5))
    wide_curves = [average(losses(0, 5.0), 2.0), average(losses(1, 5.0)[:10], 2.0)]
    expected = [at(20.0, [3.0 * i for i in range(1, len(curve) + 1)], curve) for curve in wide_curves]
    found = comparison.loss_at(wide, "time")
    assert found.mean == pytest.approx(statistics.mean(expected))
    assert found.deviation == pytest.approx(statistics.stdev(expected))
    ends = [average(losses(seed, 6.0), 2.0)[9] for seed in (0, 1)]
    assert comparison.loss_at(narrow, "tokens").mean == pytest.approx(statistics.mean(ends))


def test_the_half_life_is_the_same_number_of_tokens_for_all(tmp_path):
    """A run that tells every second step has half the records, so its half-life is half as many of them."""
    values = [5.0 + math.sin(i) for i in range(1, 401)]
    every = write_run(tmp_path / "every", [record(i, loss) for i, loss in enumerate(values, 1)])
    second = write_run(tmp_path / "second", [record(i, values[i - 1]) for i in range(2, 401, 2)])
    for path, half_life, kept in ((every, 8.0, values), (second, 4.0, values[1::2])):
        assert smoothed(read_history(path), 8.0 * BATCH) == pytest.approx(average(kept, half_life))


def test_the_table_and_the_picture(runs, capsys):
    (runs / "broken").mkdir()
    (runs / "broken" / "run.yaml").write_text(small.to_yaml())
    compare(str(runs))
    text = capsys.readouterr().out
    assert (runs / "comparison.png").read_bytes().startswith(b"\x89PNG")
    table = (runs / "comparison.md").read_text()
    assert table in text
    head, _, first, second = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    assert head[2:7] == ["validation loss", "at 20,480 tokens", "against narrow", head[5], "at 20.0 s"]
    assert re.fullmatch(r"at \d\.\d+e\+\d+ FLOPs", head[5])
    assert first[:3] == ["narrow", "2", "4.5000 ± 0.7071"]
    assert second[:3] == ["wide", "2", "5.5000 ± 0.7071"]
    differences = [average(losses(seed, 5.0), 2.0)[9] - average(losses(seed, 6.0), 2.0)[9] for seed in (0, 1)]
    assert first[4] == ""
    assert second[4] == f"{statistics.mean(differences):.4f} ± {statistics.stdev(differences):.4f}"
    assert first[7:] == [
        "2,048 ± 0",
        f"{count_parameters(small.model).total:,}",
        f"{count_parameters(small.model).active:,}",
        "120",
    ]
    assert "wide_seed1 (10 of 300 steps)" in table
    assert "the largest that every run has got to" in table
    assert "half-life is 2% of the equal tokens" in table
    assert "Left out, without a step so far: broken." in table


def test_a_baseline_by_name_and_seeds_that_are_not_common(runs, tmp_path):
    told = stories(runs)
    comparison = compare_variants(group(told), baseline="wide")
    narrow, wide = comparison.variants
    assert comparison.baseline is wide
    assert comparison.against_baseline(narrow).n == 2
    other = compare_variants(group([told[0], told[3]]))
    assert other.against_baseline(other.variants[1]) is None
    with pytest.raises(UserError, match="--baseline wider: no such variant; did you mean 'wide'"):
        compare_variants(group(told), baseline="wider")


def test_without_validation_the_training_loss_is_final(runs, tmp_path, capsys):
    bare = write_run(tmp_path / "bare", [record(i, 3.0) for i in range(1, 11)], seed=3)
    compare(str(runs / "wide_seed0"), str(bare), output=str(tmp_path / "out"))
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert "| variant | seeds | training loss |" in table
    assert "Not all runs have a validation loss" in table
    assert "| bare | 1 | 3.0000 | 3.0000 |  |" in table


def test_variants_are_told_apart_by_what_they_are(tmp_path):
    """Seeds belong together; another experiment of the same name does not, and another name never does."""
    one = write_run(tmp_path / "a", [record(1, 2.0)], name="x_seed0")
    two = write_run(tmp_path / "b", [record(1, 2.0)], name="x_seed1", seed=1)
    wide = write_run(tmp_path / "c", [record(1, 2.0)], name="x_seed2", seed=2, **WIDE)
    other = write_run(tmp_path / "d", [record(1, 2.0)], name="y")
    found = group([read_history(path) for path in (one, two, wide, other)])
    assert [(variant.name, len(variant.stories)) for variant in found] == [(str(one), 2), (str(wide), 1), ("y", 1)]


def test_nothing_to_compare(tmp_path):
    with pytest.raises(UserError, match="give run folders"):
        compare()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no run"):
        compare(str(tmp_path / "empty"))
    run = write_run(tmp_path / "runs" / "run", [])
    with pytest.raises(UserError, match="no run has told anything yet: run"):
        compare(str(run.parent))
