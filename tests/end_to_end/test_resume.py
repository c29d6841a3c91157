"""A run that is killed with SIGKILL between checkpoints goes on bitwise as if nothing had happened."""

import json
import tempfile
import time
from pathlib import Path

import pytest

from mosaic_dist.checkpoint import newest
from mosaic_dist.train.metrics import read_metrics
from tests.end_to_end.conftest import SMALL, command, deepspeed, recipe, train
from tests.launch import has_come, start_ranks

EXACT = ("step", "tokens", "loss", "auxiliary_loss", "learning_rate", "grad_norm", "validation_loss")


def story(folder: Path) -> list[dict]:
    """What must be the same, bit for bit, in two runs of one experiment (not the times)."""
    return [{key: record.get(key) for key in EXACT} for record in read_metrics(folder / "metrics.jsonl")]


def kill_at_step(words: list[str], folder: Path, step: int) -> None:
    """Start a run on two ranks and kill both once it `has_come` to `step`."""
    program, *more = words
    with tempfile.TemporaryDirectory() as outputs:
        processes = start_ranks(program, 2, *more, folder=Path(outputs))
        deadline = time.monotonic() + 120
        while not has_come(folder, step) and processes[0].poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        came, ended = has_come(folder, step), processes[0].poll()
        for process in processes:
            process.kill()
            process.wait()
        told = (Path(outputs) / "0").read_text()
        assert came, f"step {step} did not come; exit code {ended}:\n{told}"
        assert ended is None, f"the run ended before it was killed, with exit code {ended}:\n{told}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, dataset) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = command(*deepspeed(folder, dataset))
    assert done.returncode == 0, done.stdout[-4000:]
    return folder


def test_kill_and_resume_is_bitwise(undisturbed, dataset, tmp_path):
    folder = tmp_path / "run"
    words = recipe(folder, dataset)
    kill_at_step(words, folder, 6)  # checkpoint at 4
    assert newest(folder / "checkpoints").step in (4, 8)
    kill_at_step(words, folder, 10)  # checkpoint at 8
    assert train(*words).returncode == 0
    assert story(folder) == story(undisturbed)
    assert [record["step"] for record in story(folder)] == list(range(1, 13))
    for one, other in zip(*(newest(f / "checkpoints").manifest["files"] for f in (folder, undisturbed)), strict=True):
        assert one == other  # every byte of weights, moments and generators, by checksum
    states = [newest(f / "checkpoints").state for f in (folder, undisturbed)]
    assert states[0] == states[1]
    assert states[0]["data"]["cursor"] == 12 * 256 // 32


def test_the_run_folder_tells_its_story(undisturbed):
    for name in ("run.yaml", "ds_config.json", "environment.json", "loss.png", "tokenizer.json"):
        assert (undisturbed / name).stat().st_size > 0
    environment = json.loads((undisturbed / "environment.json").read_text())
    assert (environment["world_size"], environment["expert_parallel"], environment["zero_stage"]) == (2, 2, 2)
    losses = [record["loss"] for record in story(undisturbed)]
    assert losses[0] == pytest.approx(6.24, abs=0.15)  # ln 512
    assert losses[-1] < losses[0] - 0.2
    assert [record["step"] for record in story(undisturbed) if record["validation_loss"]] == [6, 12]
    assert len(list((undisturbed / "checkpoints").glob("step_*"))) == 2
    saves = [record for record in read_metrics(undisturbed / "metrics.jsonl") if "save_seconds" in record]
    assert {record["step"] for record in saves} <= set(range(5, 13))
    assert len(saves) in (1, 2)  # of three: the last one is not told, and one can be quicker than the next record
    assert all(0 <= record["save_stall_seconds"] <= record["save_seconds"] for record in saves)


def test_a_finished_run_and_a_foreign_one(undisturbed, dataset):
    before = story(undisturbed)
    again = train(*recipe(undisturbed, dataset))
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert story(undisturbed) == before
    other = train(*recipe(undisturbed, dataset, "--seed", "5", "--model.layers.ffn.top_k", "1"))
    assert other.returncode == 2
    assert other.stdout.count("holds another run") == 1
    assert "seed: 0 there, 5 here" in other.stdout
    assert "model.layers.ffn.top_k: 2 there, 1 here" in other.stdout


def test_another_layout_goes_on_with_the_same_losses(undisturbed, dataset, tmp_path):
    """Half on 2 ranks with expert parallelism and ZeRO-2, the rest in one process with ZeRO-3."""
    folder = tmp_path / "run"
    assert train(*recipe(folder, dataset, "--stop_at_step", "6")).returncode == 0
    words = recipe(folder, dataset)
    words[words.index("ds_configs/zero2.json")] = "ds_configs/zero3.json"
    done = train(*words, ranks=1)
    assert done.returncode == 0, done.stdout[-4000:]
    got, expected = story(folder), story(undisturbed)
    assert got[:6] == expected[:6]
    for one, other in zip(got, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["tokens"] == other["tokens"]


def test_ranks_that_share_sequences_have_the_same_losses(undisturbed, dataset, tmp_path):
    """They read the same samples, and count and validate them once; the micro-batches are the same ones."""
    folder = tmp_path / "run"
    done = train(*recipe(folder, dataset, "--parallel.sequence_parallel", "2", "--stop_at_step", "6"))
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1 groups of 2 ranks, expert parallel 2" in done.stdout
    got, expected = story(folder), story(undisturbed)[:6]
    assert [record["tokens"] for record in got] == [record["tokens"] for record in expected]
    for one, other in zip(got, expected, strict=True):
        for name in ("loss", "auxiliary_loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name
    assert got[-1]["validation_loss"] == pytest.approx(expected[-1]["validation_loss"], rel=1e-4)
    assert newest(folder / "checkpoints").state["data"]["cursor"] == 6 * 256 // 32


def test_early_stopping_keeps_the_best_and_the_last(dataset, tmp_path):
    """A learning rate that ruins the model: the first validations are the best."""
    folder = tmp_path / "run"
    words = ["python", "recipes/t4_moe.py", "--data", str(dataset), "--output", str(folder), *SMALL]
    for flag, value in (("--optimizer.learning_rate", "2.0"), ("--validate_every_steps", "1")):
        words[words.index(flag) + 1] = value
    words += "--early_stopping_patience 3 --checkpoint.keep_best 2 --checkpoint.keep_last 1".split()
    done = command(*words)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "stopped early" in done.stdout
    losses = {record["step"]: record["validation_loss"] for record in story(folder)}
    assert max(losses) < 12
    best = sorted(losses, key=lambda step: losses[step])[:2]
    assert all(losses[max(losses) - i] > losses[best[0]] for i in range(3))
    found = {int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*")}
    assert found == {*best, max(losses)}
    again = command(*words)
    assert again.returncode == 0
    assert "nothing to do: the run was stopped early" in again.stdout
