"""The benchmark of scale: its exponents on curves whose order is known, where an axis ends, and its command."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from benchmarks.cost_of_scale.__main__ import is_beyond
from benchmarks.cost_of_scale.axes import Cost, doubled, of_batch, of_expert_parallel
from benchmarks.cost_of_scale.exponent import exponent, grows_too_fast
from benchmarks.cost_of_scale.measure import measure_on_ranks
from mosaic_dist.model import count_parameters
from tests.launch import ROOT, clean_environment

SIZES = doubled(512, 131_072)


@pytest.mark.parametrize("order", [0.0, 0.5, 1.0, 2.0])
def test_exponents_of_powers(order):
    assert exponent(SIZES, [3.0 * size**order for size in SIZES]) == pytest.approx(order)


def test_the_largest_term_decides_in_the_upper_half():
    found = exponent(SIZES, [1e3 + size + 1e-2 * size**2 for size in SIZES])
    assert found is not None
    assert found == pytest.approx(2.0, abs=0.15)
    assert exponent(SIZES, [100.0 + math.log(size) for size in SIZES]) == pytest.approx(0.0, abs=0.02)


def test_no_exponent_of_one_point_or_of_nothing():
    assert exponent([1], [2.0]) is None
    assert exponent([1, 2, 4], [0.0, 1.0, 2.0]) is None


def test_a_hidden_square_is_found_and_overhead_is_not():
    def judge(figures: list[float]) -> bool:
        return grows_too_fast(exponent(SIZES, figures), 1.0)

    assert judge([0.01 * size + 1e-6 * size**2 for size in SIZES])  # a mask of T times T beside linear work
    assert not judge([50.0 + 0.01 * size for size in SIZES])
    assert not judge([size * math.log2(size) for size in SIZES])


def test_an_axis_ends_before_what_the_growth_says_is_too_much():
    limit, four, sixteen = Cost(20.0, 20.0, 100, 100), Cost(1.0, 0.1, 10, 20), Cost(4.0, 0.1, 11, 21)
    assert not is_beyond([four, sixteen], limit)  # 16 seconds are next
    assert is_beyond([four, sixteen], limit._replace(seconds=15.0))
    assert is_beyond([four, four._replace(peak_bytes=60)], limit)
    assert not is_beyond([four], limit)


def test_the_command_measures_steps(tmp_path):
    page = tmp_path / "results" / "scale.md"
    words = f"--axes batch --largest 2 --rounds 1 --output {page}".split()
    subprocess.run(
        [sys.executable, "-m", "benchmarks.cost_of_scale", *words], cwd=ROOT, env=clean_environment(), check=True
    )
    told = json.loads(page.with_suffix(".json").read_text())
    one, two = (told["figures"]["batch"][size] for size in ("1", "2"))
    states = 16 * count_parameters(of_batch(1).model).total  # weights, gradients and two moments in float32
    assert two["kept_bytes"] == pytest.approx(2 * one["kept_bytes"], rel=0.05)  # the loss keeps its weights' gradient
    assert states < one["peak_bytes"] < two["peak_bytes"] < 5 * states
    assert one["seconds"] > 0 < one["update_seconds"]
    assert "| batch | 1 to 2 | kept for backward (MiB)" in page.read_text()
    assert page.with_suffix(".png").stat().st_size > 10_000


def test_ranks_of_their_own_share_the_experts():
    cost = measure_on_ranks(dataclasses.replace(of_expert_parallel(2), ranks=2), rounds=1, clock="cpu")
    experts = 16 * 3 * 256 * 256
    assert cost.seconds > 0 < cost.update_seconds
    assert 8 * experts < cost.peak_bytes < 16 * experts + 100e6  # half of weights, gradients and moments, and the rest
