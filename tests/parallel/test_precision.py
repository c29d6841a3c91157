"""Training steps in bfloat16 are those in float32 but for rounding, on every device."""

import json

import pytest

from tests.launch import check, run_ranks


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_is_float32_but_for_rounding(device, tmp_path, monkeypatch):
    """A bfloat16 number is off by up to 2**-9; loss and norm are averages over many of them."""
    if device == "cpu":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check(run_ranks("tests.parallel.precision_ranks", 1, str(tmp_path / "told.json")))
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["device"] == device
    for exact, rounded in zip(told["fp32"], told["bf16"], strict=True):
        assert rounded == pytest.approx(exact, rel=2**-6)
    assert told["fp32"][-1][0] < told["fp32"][0][0]
