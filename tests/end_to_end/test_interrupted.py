"""A stop signal to any rank, or the clock: the run saves, ends with its own exit code, and goes on bitwise."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mosaic_dist.checkpoint import Checkpoint, newest, steps
from mosaic_dist.checkpoint.folder import final_path
from mosaic_dist.parallel.world import free_port
from mosaic_dist.train.interruption import INTERRUPTED_EXIT_CODE
from tests.end_to_end.conftest import SMALL, command, deepspeed
from tests.end_to_end.interrupted import DISK_FULL
from tests.end_to_end.test_resume import story
from tests.launch import ROOT, clean_environment


def set_fault(monkeypatch: pytest.MonkeyPatch, fault: str, rank: int, step: int) -> None:
    for name, value in (("FAULT", fault), ("FAULT_RANK", rank), ("FAULT_STEP", step)):
        monkeypatch.setenv(name, str(value))


def with_launcher(launcher: str, words: list[str]) -> list[str]:
    """The words of `deepspeed` for the recipe with faults, started by one launcher or the other."""
    place = words.index("recipes/t4_moe.py")
    start = {
        "deepspeed": [*words[:place], "--module"],
        "torchrun": ["torchrun", f"--master-port={free_port()}", "--nproc-per-node", "2", "-m"],
    }[launcher]
    return [*start, "tests.end_to_end.interrupted", *words[place + 1 :]]


def check_stopped(folder: Path, step: int, output: str) -> None:
    assert output.count(f"stopped by a signal: step {step}, ") == 1
    assert [record["step"] for record in story(folder)] == list(range(1, step + 1))
    assert newest(folder / "checkpoints").step == step


def test_signals_lose_nothing(dataset, tmp_path, monkeypatch):
    """Saved in the background and interrupted three times, against one pass that saves in the foreground."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(*deepspeed(whole, dataset, "--checkpoint.asynchronous", "False")).returncode == 0
    for launcher, step in (("torchrun", 1), ("deepspeed", 2)):
        set_fault(monkeypatch, "SIGINT", rank=1, step=step)
        done = command(*with_launcher(launcher, deepspeed(parts, dataset)))
        check_stopped(parts, step, done.stdout)
        assert done.stdout.count("Ctrl-C: the run saves at the end of this step and stops") == 1
    set_fault(monkeypatch, "SIGTERM", rank=0, step=6)
    done = command(*with_launcher("deepspeed", deepspeed(parts, dataset)))
    assert done.returncode == INTERRUPTED_EXIT_CODE, done.stdout[-4000:]
    check_stopped(parts, 6, done.stdout)
    set_fault(monkeypatch, DISK_FULL, rank=0, step=99)  # never
    done = command(*with_launcher("deepspeed", deepspeed(parts, dataset)))
    assert done.returncode == 0, done.stdout[-4000:]
    assert story(parts) == story(whole)
    assert steps(parts / "checkpoints") == steps(whole / "checkpoints") == [8, 12]
    for step in (8, 12):  # steps went on beside the copy of the first
        one, other = (Checkpoint.open(final_path(folder / "checkpoints", step)) for folder in (parts, whole))
        assert one.state == other.state
        assert one.manifest["files"] == other.manifest["files"]  # weights, moments and generators, by checksum


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal for it is Linux's")
def test_a_killed_launcher_leaves_no_ranks(dataset, tmp_path):
    """They are told by the kernel, save, and end; the run folder is free again."""
    folder = tmp_path / "run"
    words = deepspeed(folder, dataset, "--steps", "2000", "--checkpoint.every_steps", "5000")
    process = subprocess.Popen(words, cwd=ROOT, env=clean_environment(), start_new_session=True)
    deadline = time.monotonic() + 150
    while not any(record["step"] >= 2 for record in story(folder)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (launcher,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(launcher), signal.SIGKILL)  # the parent of the ranks
    process.kill()
    process.wait()
    while of_session(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert newest(folder / "checkpoints").step == story(folder)[-1]["step"]


def of_session(leader: int) -> list[str]:
    """Processes whose session began with that process, but for those that are dead already."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(path.parent.name)
    return found


def test_a_full_disk_ends_the_run_with_one_error(dataset, tmp_path, monkeypatch):
    set_fault(monkeypatch, DISK_FULL, rank=1, step=8)
    done = command(*with_launcher("deepspeed", deepspeed(tmp_path / "run", dataset)))
    assert done.returncode == 2, done.stdout[-4000:]
    assert done.stdout.count("error: ") == 1
    assert "step_00000008 was not saved: rank 1: OSError: [Errno 28] No space left on device" in done.stdout
    assert steps(tmp_path / "run" / "checkpoints") == [4]


def test_the_clock(dataset, tmp_path):
    words = ["python", "recipes/t4_moe.py", "--data", dataset, "--output", tmp_path / "run", *SMALL]
    done = command(*words, "--max_minutes", "0.001")
    assert done.returncode == INTERRUPTED_EXIT_CODE, done.stdout[-4000:]
    assert "stopped by --max_minutes: step 1, " in done.stdout
    assert newest(tmp_path / "run" / "checkpoints").step == 1
    again = command(*words, "--stop_at_step", "2", "--max_minutes", "30")
    assert again.returncode == 0, again.stdout[-4000:]
    assert newest(tmp_path / "run" / "checkpoints").step == 2
