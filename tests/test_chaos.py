"""The benchmark that kills: it finds nothing in a run that is as it should be, and it does find what is not."""

import dataclasses
import json
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from random import Random

import pytest
import torch

from benchmarks.chaos.aim import MOMENTS
from benchmarks.chaos.campaign import Campaign, Kill, Outcome, Setting, first_difference, newest_step, story
from benchmarks.chaos.job import Ending, Process, kill
from benchmarks.chaos.report import verdict
from mosaic_dist.checkpoint import TensorShard, save
from tests.end_to_end.conftest import command

KILL = Kill("synchronous", "step", 1, Ending(2.0, 3.0), load=1.0, reached=7, complete=4, left=4)


def make_run(folder: Path, losses: list[float], weight: float = 1.0) -> Path:
    """What a run of so many steps leaves behind, in small."""
    records = [{"step": step, "loss": loss, "step_seconds": 0.1} for step, loss in enumerate(losses, 1)]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    piece = TensorShard("a", "master", 0, torch.full((8,), weight))
    save(folder / "checkpoints", len(losses), [piece], {"a": (8,)}, {"cursor": len(losses)}, {})
    return folder


def problems_of(disturbed: Path, undisturbed: Path) -> list[str]:
    """What the comparison of two finished runs finds."""
    outcome = Outcome()
    setting = Setting(("torchrun",), 1, [], disturbed.parent)
    Campaign(setting, disturbed.name, [], Random(0), outcome).compare(undisturbed)
    return outcome.problems


@pytest.fixture
def undisturbed(tmp_path) -> Path:
    return make_run(tmp_path / "undisturbed", [6.0, 5.0, 4.0])


def test_equal_runs_have_no_problems(undisturbed, tmp_path):
    assert problems_of(make_run(tmp_path / "run", [6.0, 5.0, 4.0]), undisturbed) == []


def test_any_difference_is_a_problem(undisturbed, tmp_path):
    loss = make_run(tmp_path / "loss", [6.0, 5.0000000000000009, 4.0])
    assert problems_of(loss, undisturbed) == ["loss: step 2: loss is 5.000000000000001, not 5.0"]
    weight = make_run(tmp_path / "weight", [6.0, 5.0, 4.0], weight=1.0000001)
    assert problems_of(weight, undisturbed) == ["weight: the files of the last checkpoint differ"]
    rubbish = make_run(tmp_path / "rubbish", [6.0, 5.0, 4.0])
    (rubbish / "checkpoints" / ".step_00000002.deleting").mkdir()
    assert problems_of(rubbish, undisturbed) == ["rubbish: left in the folder: checkpoints/.step_00000002.deleting"]


def test_a_story_may_be_shorter_but_not_another(undisturbed):
    whole = story(undisturbed)
    assert first_difference(whole[:2], whole, whole=False) is None
    assert first_difference(whole[:2], whole, whole=True) == "2 records, not 3"
    assert first_difference([*whole, whole[-1]], whole, whole=False) == "4 records, not 3"
    assert first_difference(whole[1:], whole, whole=False) == "step 1: step is 2, not 1"


def test_a_damaged_checkpoint_is_a_problem_and_does_not_count(undisturbed):
    problems: list[str] = []
    assert newest_step(undisturbed, problems) == 3
    assert problems == []
    file = undisturbed / "checkpoints" / "step_00000003" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert newest_step(undisturbed, problems) == 0
    assert len(problems) == 1


def test_steps_before_the_last_save_must_not_be_lost():
    assert (KILL.lost_steps, KILL.lost_too_many) == (3, False)
    fallen_back = dataclasses.replace(KILL, left=0)
    assert (fallen_back.lost_steps, fallen_back.lost_too_many) == (7, True)
    assert verdict(Outcome([KILL], starts=2), 12).startswith("0 of 1 kills lost more")
    assert verdict(Outcome([KILL], problems=["something"]), 12) == "Not as it must be:\n\n- something"


def test_who_is_gone_already_was_not_killed():
    child = subprocess.Popen(["sleep", "60"])
    victim = [Process(child.pid, 0, False)]
    assert kill(victim) == 1
    assert child.wait() == -signal.SIGKILL
    assert kill(victim) == 0


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path):
    source = Path(sysconfig.get_path("stdlib")) / "json"
    words = "-m benchmarks.chaos --kills 2 --ranks 1 --launcher torchrun --asynchronous True".split()
    table = tmp_path / "chaos.md"
    done = command(sys.executable, *words, "--input", source, "--output", table, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "0 of 2 kills lost more than the steps since the last save" in table.read_text()
    assert any(f"| asynchronous | {moment} | " in table.read_text() for moment in MOMENTS)
