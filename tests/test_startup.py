"""The benchmark of starting: its phases add up to the whole, and its command."""

import json
import subprocess
import sys

import pytest

from benchmarks.startup.__main__ import Spent, by_package, medians, phases
from tests.launch import ROOT, clean_environment

SMALL = (
    "--model.vocab_size 1024 --model.dim 32 --model.embedding.rank 16 --model.layers.attention.heads 2 "
    "--model.layers.ffn.expert.hidden_dim 64 --model.layers.ffn.experts 4 --model.layers.ffn.split 4 --data.workers 0"
).split()


def test_phases_follow_each_other_from_the_launch_on():
    told = {
        "started": 107.0,
        "ancestors": [[103.0, 2.5], [100.02, 2.0], [50.0, 900.0]],  # the last one launched it all
        "marks": [["Python", 107.5, 0.1], ["import torch", 110.0, 2.1], ["first step", 111.0, 2.6]],
    }
    found = phases(told, launched=100.0)
    assert list(found) == ["launcher, process 1", "launcher, process 2", "Python", "import torch", "first step"]
    assert [spent.seconds for spent in found.values()] == pytest.approx([3.0, 4.0, 0.5, 2.5, 1.0])
    assert [spent.cpu_seconds for spent in found.values()] == pytest.approx([2.0, 2.5, 0.1, 2.0, 0.5])


def test_medians_are_of_each_phase():
    rounds = [{"a": Spent(1.0, 5.0)}, {"a": Spent(9.0, 1.0)}, {"a": Spent(2.0, 3.0)}]
    assert medians(rounds) == {"a": Spent(2.0, 3.0)}


def test_import_times_are_summed_up_by_top_package():
    lines = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       100 |        100 |   torch._C\n"
        "import time:       900 |       1000 | torch\n"
        "import time:        50 |       1050 | torchvision\n"
        "a warning on the same stream\n"
    )
    assert by_package(lines) == {"torch": pytest.approx(1e-3), "torchvision": pytest.approx(5e-5)}


@pytest.mark.slow
def test_the_command_tells_every_phase_of_a_start(tmp_path):
    page = tmp_path / "startup.md"
    words = ["--launchers", "torchrun", "--ranks", "1", "--rounds", "1", "--output", str(page), *SMALL]
    environment = clean_environment()
    subprocess.run([sys.executable, "-m", "benchmarks.startup", *words], cwd=ROOT, env=environment, check=True)
    told = json.loads(page.with_suffix(".json").read_text())
    assert list(told["figures"]["torchrun"]) == [
        "launcher, process 1", "Python", "import torch", "import deepspeed", "import ours",
        "flags, model's size, data's description", "rendezvous", "run folder", "model", "DeepSpeed engine",
        "checkpoint, data", "metrics, trackers", "first batch", "first step",
    ]  # fmt: skip
    assert all(spent["seconds"] >= 0 <= spent["cpu_seconds"] for spent in told["figures"]["torchrun"].values())
    assert told["figures"]["imports"]["torch"] > 0.1
    assert "Compiled: nothing." in page.read_text()
    assert page.with_suffix(".png").stat().st_size > 10_000
