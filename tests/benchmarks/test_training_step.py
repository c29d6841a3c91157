"""The benchmark of training steps: its contenders do the same, and its figures are what they are called."""

import json
import subprocess
import sys
from collections import Counter
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.training_step import ceiling as ceilings
from benchmarks.training_step.cases import SIZES, Size, make_case
from benchmarks.training_step.ceiling import Product, Products, ceiling, dominant
from benchmarks.training_step.measure import best_peer, rotated, times
from benchmarks.training_step.report import compare, ratios, render
from benchmarks.training_step.seats import Place, RemoteEntrant
from tests.launch import ROOT, clean_environment

PEERS = {
    "gpt2_reference": {"transformers", "plain"},
    "mosaic_small": {"transformers"},
    "mosaic_dense": {"transformers"},
    "nano_moe": {"transformers"},
    "t4_moe": {"transformers", "autoep"},
    "gptoss_20b": {"transformers", "autoep"},
}
FACTS = dict.fromkeys(("command", "commit", "date", "torch", "deepspeed", "transformers", "hardware", "memory"), "-")


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    """All cases in tiny, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.steps_process"]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return {result["recipe"]: result for result in json.loads(done.stdout.splitlines()[-1])}


def test_every_recipe_meets_its_peers(results):
    assert {name: result["contenders"].keys() - {"ours"} for name, result in results.items()} == PEERS


def test_contenders_train_the_same_model(results):
    """Equal losses before and after an update: the weights, clipping, AdamW and what decays are the same."""
    for name, result in results.items():
        ours = result["contenders"]["ours"]
        for peer, found in result["contenders"].items():
            assert found["parameters"] == ours["parameters"], (name, peer)
            assert found["losses"] == pytest.approx(ours["losses"], rel=2e-5), (name, peer)
        assert ours["losses"][1] < ours["losses"][0] - 0.1  # so the second one tells of the update


def test_bytes_are_those_of_the_states(results):
    """Plain AdamW keeps weights and two moments between steps; ZeRO-1 a flat copy of the weights besides.

    GPT-2 of transformers 4 keeps a mask [context, context] in each of its layers, here one.
    """
    rows = results["gpt2_reference"]["contenders"]
    mask_bytes = 1024 * 1024 if int(version("transformers").partition(".")[0]) < 5 else 0
    for name, numbers, more in (("plain", 3, 0), ("ours", 4, 0), ("transformers", 4, mask_bytes)):
        weights = 4 * rows[name]["parameters"]
        assert rows[name]["state_bytes"] == pytest.approx(numbers * weights + more, rel=0.001), name
        assert rows[name]["peak_bytes"] > rows[name]["state_bytes"] + weights  # gradients


def test_figures_agree_with_each_other(results):
    for result in results.values():
        tokens = result["micro_batch_size"] * result["seq_len"]
        for found in result["contenders"].values():
            assert len(found["all_seconds"]) == 2
            assert found["tokens_per_second"] * found["seconds"] == pytest.approx(tokens)
            assert found["tflops"] / result["ceiling_tflops"]["fp32"] == pytest.approx(found["mfu"])
        assert sum(result["phases"].values()) == pytest.approx(1, abs=0.02)
        assert result["phases"].keys() >= {"attention", "head and loss", "clipping and update", "waiting"}


def test_the_page_has_a_row_for_everyone(results):
    page = render(list(results.values()), FACTS | {"rounds": 2})
    for name, peers in PEERS.items():
        assert page.count(f"| `{name}` | ") == len(peers) + 3  # all contenders, the shape, the phases


def test_the_committed_results_can_be_compared_with():
    """`make bench` reads them."""
    committed = json.loads((ROOT / "benchmarks/results/training_step_cpu.json").read_text())
    assert render(committed["results"], committed["facts"]).count("\n| `") >= len(committed["results"])


@pytest.mark.slow
def test_contenders_in_processes_of_their_own(results, tmp_path):
    """The command as people run it: the same losses as in one process."""
    words = "--recipes mosaic_dense --scale tiny --dtype fp32 --rounds 2".split()
    command = [sys.executable, "-m", "benchmarks.training_step", *words, "--output", str(tmp_path / "made" / "it.json")]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (result,) = json.loads((tmp_path / "made" / "it.json").read_text())["results"]
    rows, together = result["contenders"], results["mosaic_dense"]["contenders"]
    assert list(rows) == ["ours", "transformers", "transformers_kept"]
    assert rows["transformers"]["losses"] == pytest.approx(together["transformers"]["losses"], rel=2e-5)
    assert (tmp_path / "made" / "it.md").read_text().strip() in done.stdout


def test_a_process_that_is_killed_is_named():
    entrant = RemoteEntrant(Place("nano_moe", "tiny", "ours", "fp32"))
    assert entrant.step() > 0
    entrant.process.kill()
    with pytest.raises(SystemExit, match=r"ours of nano_moe: exit code -9 \(-9: killed"):
        entrant.step()
    entrant.end()


def test_a_slice_keeps_the_share_of_the_head():
    case = make_case("gpt2_reference", Size(layers=2, seq_len=256, micro_batch_size=3))
    assert case.run.model.vocab_size == 8384  # 50,257 / 6, up to a multiple of 64
    assert (len(case.run.model.layers), case.run.model.dim, case.tokens) == (2, 768, 768)
    narrow = make_case("gptoss_20b", SIZES["cpu"]["gptoss_20b"]).run.model
    attention, ffn = narrow.layers[0].attention, narrow.layers[0].ffn
    assert (narrow.dim, attention.heads, ffn.expert.hidden_dim) == (512, 8, 3040)
    assert make_case("mosaic_small", Size(layers=2, narrow=4)).run.model.position.rope_head_dim == 32
    whole = make_case("gpt2_reference", Size())
    assert (whole.run.model.vocab_size, whole.tokens) == (50_257, 12 * 1024)


def test_ratios_are_of_the_same_round():
    seconds = {"ours": [1.0, 2.0, 4.0], "a": [2.0, 2.0, 4.0], "b": [3.0, 3.0, 3.0]}
    assert best_peer(seconds) == "a"
    assert times(seconds) == {"a": 1.0, "b": 1.5}
    assert [rotated(["x", "y", "z"], turn) for turn in (1, 5)] == [["y", "z", "x"], ["z", "x", "y"]]


def test_ratios_to_results_of_before():
    def result(rate: float, peak: int, lead: float) -> dict:
        row = {"tokens_per_second": rate, "peak_bytes": peak}
        return {"recipe": "r", "contenders": {"ours": row, "a": row}, "times": {"a": lead}}

    new, old = result(300.0, 10, 1.5), result(200.0, 40, 1.25)
    assert ratios(new["contenders"]["ours"], old["contenders"]["ours"]) == (1.5, 0.25)
    _, ours, peer = compare([new], [old]).splitlines()
    assert ours.split() == ["r", "ours", "1.50", "0.25"]
    assert peer.split() == ["r", "a", "1.50", "0.25", "1.50", "(1.25)"]
    assert compare([new], [old | {"recipe": "other"}]).count("\n") == 0


def test_products_are_counted():
    layer, x = torch.nn.Linear(8, 16), torch.randn(32, 8)
    with Products() as products:
        layer(x).sum().backward()
    assert sum(product.flops * times for product, times in products.found.items()) == 2 * (2 * 32 * 8 * 16)

    def square(size: int) -> Product:
        return Product(((size, size), (size, 1)), ((size, size), (size, 1)))

    found = Counter({square(10): 1, square(20): 3, square(1): 500})  # 2,000, 48,000 and 1,000 operations
    assert dominant(found) == {square(20): 3}


def test_a_ceiling_is_measured_on_random_numbers(monkeypatch):
    """On constants a GPU is faster than in training."""
    operands: list[torch.Tensor] = []
    monkeypatch.setattr(torch, "mm", lambda left, right: operands.extend((left, right)))
    monkeypatch.setattr(ceilings, "CEILING_REPEATS", 1)
    product = Product(((32, 16), (16, 1)), ((16, 8), (1, 16)))
    assert ceiling(Counter({product: 2}), torch.bfloat16, torch.device("cpu")) > 0
    assert [tuple(operand.shape) for operand in operands] == [(32, 16), (16, 8)]
    assert all(operand.float().std() > 0.5 for operand in operands)
