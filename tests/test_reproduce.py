"""A run made again is bitwise the same; what is not as it was, and a number that is not, are named."""

import json
import math
import shutil
import sys

import pytest

from mosaic_dist.errors import UserError
from mosaic_dist.reproduce.circumstances import changes, check_data, read_folder
from mosaic_dist.reproduce.command import launch, own_config, reproduce
from mosaic_dist.reproduce.comparison import Difference, compare, relative
from mosaic_dist.spec import override
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.metrics import read_metrics
from tests.end_to_end.conftest import command
from tests.evaluate.conftest import make_sums


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    path = tmp_path_factory.mktemp("sums") / "data"
    make_sums(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, sums):
    path = tmp_path_factory.mktemp("run") / "run"
    words = ("--data", sums, "--output", path, "--micro_batch_size", "8", "--validate_every_steps", "2")
    done = command(sys.executable, "-m", "tests.train.expert_run", *words)
    assert done.returncode == 0, done.stdout[-3000:]
    return path


def test_a_run_is_made_again_and_a_changed_number_is_found(run, tmp_path, capsys):
    again = tmp_path / "again"
    reproduce(str(run), output=str(again))
    told = capsys.readouterr().out
    assert "steps compared" in told
    assert told.splitlines()[-3:] == [
        "all of them are bitwise equal",
        "the files of the last checkpoint that both have are the same",
        "reproduced, bitwise",
    ]
    report = json.loads((again / "reproduction.json").read_text())
    assert (report["equal"], report["steps"], report["first"], report["missing"]) == (True, 5, None, [])
    assert report["numbers"] > 5 * 20  # with the loads of 12 experts
    assert [one["loss"] for one in read_metrics(again / "metrics.jsonl")] == [
        one["loss"] for one in read_metrics(run / "metrics.jsonl")
    ]

    other = tmp_path / "other"
    shutil.copytree(run, other)
    records = read_metrics(other / "metrics.jsonl")
    records[1]["grad_norm"] *= 1 + 1e-7
    records[3]["loss"] *= 1 + 1e-3
    (other / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(SystemExit) as ended:
        reproduce(str(other), steps=4)
    assert ended.value.code == 1
    told = capsys.readouterr().out
    assert "first difference: step 2, grad_norm" in told
    assert "largest difference: step 4, loss" in told
    assert told.endswith("NOT reproduced, bitwise\n")
    report = json.loads((tmp_path / "other_again" / "reproduction.json").read_text())
    assert report["largest"]["relative"] == pytest.approx(1e-3, rel=1e-2)
    assert len(read_metrics(tmp_path / "other_again" / "metrics.jsonl")) == 4
    with pytest.raises(UserError, match="other_again exists"):
        reproduce(str(other))


def test_other_data_is_refused(run, sums, tmp_path):
    folder, recipe = read_folder(str(run))
    assert "have the digests of step 5" in check_data(recipe, folder)
    make_sums(tmp_path / "fewer", 99)
    moved = override(recipe, {"data.path": str(tmp_path / "fewer")})
    with pytest.raises(UserError, match=r"not the data that the run was trained on: .*index was"):
        check_data(moved, folder)
    shutil.copytree(sums, tmp_path / "copy")
    assert "digests of step 5" in check_data(override(recipe, {"data.path": str(tmp_path / "copy")}), folder)
    with pytest.raises(UserError, match=r"it has no run\.yaml"):
        read_folder(str(tmp_path))


def test_what_an_environment_has_otherwise_is_listed():
    there = {"python": "3.11.1", "device": "H100", "git_commit": "a", "git_clean": True, "packages": {"torch": "2.11"}}
    here = there | {"python": "3.12.0", "packages": {"torch": "2.12", "numpy": "2.0"}, "world_size": 7}
    assert {tuple(change) for change in changes(there, here)} == {
        ("torch", "2.11", "2.12", True),
        ("numpy", None, "2.0", True),
        ("python", "3.11.1", "3.12.0", False),
    }
    assert list(changes(there, there)) == []
    dirty = there | {"git_clean": False}
    assert [change.what for change in changes(dirty, dirty)] == ["git_clean"]


def test_numbers_are_compared_by_step_and_name():
    there = [
        {"step": 1, "loss": 2.0, "step_seconds": 1.0, "experts": {"layers.1": {"load": [3, 5]}}},
        {"step": 2, "loss": math.nan, "validation_loss": 3.0, "epoch/web": 0.5},
        {"step": 3, "loss": 1.0},
    ]
    same = [dict(record, step_seconds=9.0, memory_bytes=1) for record in there]
    found = compare(there, same, 3)
    assert found[:4] == (3, 1 + 2 + 3 + 1, None, None)
    assert found.is_within(0)
    here = [
        {"step": 1, "loss": 2.0, "experts": {"layers.1": {"load": [3, 4]}}},
        {"step": 2, "loss": 1.0, "epoch/web": 0.5},
    ]
    found = compare(there, here, 3)
    assert found.first == Difference(1, "experts/layers.1/load[1]", 5.0, 4.0, 0.2)
    assert found.largest[:2] == (2, "loss")
    assert found.largest.relative == math.inf
    assert found.missing == [3]
    assert not found.is_within(1e9)
    assert compare(there[:1], here, 3).is_within(0.2)
    assert not compare(there[:1], here, 3).is_within(0.19)
    assert relative(-1.0, 1.0) == 2.0


def test_ranks_are_started_as_before():
    assert launch("auto", 1) == launch("python", 1) == [sys.executable, "-m", "mosaic_dist.reproduce.rerun"]
    assert launch("auto", 4)[2:6] == ["torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    assert "--num_gpus 4" in " ".join(launch("deepspeed", 4))
    assert launch("srun --ntasks 4", 4)[:3] == ["srun", "--ntasks", "4"]
    with pytest.raises(UserError, match="had 4 ranks"):
        launch("python", 4)


def test_the_config_is_the_run_s_own_again(tmp_path):
    """At ZeRO stage 0 DeepSpeed is told not to clip, whatever the recipe says."""
    filled = {
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 0.0,
        "train_batch_size": 8,
        "bf16": {"enabled": False},
    }
    (tmp_path / "ds_config.json").write_text(json.dumps(filled))
    assert own_config(RunFolder(tmp_path)) == {"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}}
