"""A sweep goes through its runs, whatever becomes of some of them: with a real training, and with a script for one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mosaic_dist.checkpoint import newest
from mosaic_dist.compare import processes
from mosaic_dist.compare.compare import compare
from mosaic_dist.compare.history import read_spec
from mosaic_dist.compare.report import report
from mosaic_dist.compare.sweep import sweep, tell
from mosaic_dist.compare.sweep_config import SweepConfig, plan_runs
from mosaic_dist.errors import UserError
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.interruption import INTERRUPTED_EXIT_CODE
from mosaic_dist.train.metrics import read_metrics
from tests.compare.folders import record, write_run
from tests.end_to_end.conftest import python
from tests.launch import ROOT, clean_environment, has_come

STEPS = 40
PATIENCE_SECONDS = 400.0
"""Twenty times what it takes on an idle machine."""
SHEET = """
recipe: recipes/sweeps/small.py
flags:
  model.vocab_size: 18
  model.dim: 32
  model.max_seq_len: 16
  model.layers.ffn.hidden_dim: 32
  batch_tokens: 64
  micro_batch_size: 4
  steps: {steps}
  schedule.warmup_steps: 0
  checkpoint.every_steps: 4
  validate_every_steps: 20
  data.workers: 0
variants:
  gqa: {{}}
  mqa: {{model.layers.attention: mqa}}
"""


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def sheet(tmp_path) -> Path:
    path = tmp_path / "sheet.yaml"
    path.write_text(SHEET.format(steps=STEPS))
    return path


class Started:
    """A sweep as a process, its run in a session of its own."""

    def __init__(self, words: list[str]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mosaic_dist", "sweep", *words],
            cwd=ROOT, env=clean_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.lose_power()

    def wait_for_step(self, run: Path, step: int) -> None:
        """Until the run has told of a step, and has a checkpoint, which is written beside the steps."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not has_come(run, step):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, f"{run} did not come to step {step}"
            time.sleep(0.01)

    def end(self) -> str:
        """What it said, when it is over."""
        return self.process.communicate(timeout=PATIENCE_SECONDS)[0]

    def lose_power(self) -> None:
        """Kill the sweep and its run at once."""
        runs = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.process.kill()
        for run in runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(run), signal.SIGKILL)
        self.process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="the children of a process are found in /proc")
@pytest.mark.timeout(1200)
def test_a_sweep_is_stopped_and_killed_and_goes_on(sheet, tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "runs"
    python("-m", "data_prep.arithmetic", "--output", data, "--samples", "60", "--high", "9", "--seq_len", "16",
           "--validation_fraction", "0.35")  # fmt: skip
    words = [str(sheet), "--output", str(output), "--data", str(data), "--launcher", "python"]
    first, second = output / "gqa_seed0", output / "mqa_seed0"

    with Started(words) as started:
        started.wait_for_step(first, 6)
        started.process.send_signal(signal.SIGTERM)
        told = started.end()
    assert started.process.returncode == INTERRUPTED_EXIT_CODE, told
    stopped_at = read_metrics(first / "metrics.jsonl")[-1]["step"]
    assert newest(first / "checkpoints").step == stopped_at < STEPS
    assert f"stopped: gqa_seed0: at step {stopped_at} of {STEPS}" in told
    assert "stopped: mqa_seed0: not started" in told

    with Started(words) as started:
        started.wait_for_step(second, 6)
        started.lose_power()
    assert newest(first / "checkpoints").step == STEPS
    assert 4 <= newest(second / "checkpoints").step < STEPS

    done = subprocess.run([sys.executable, "-m", "mosaic_dist", "sweep", *words], cwd=ROOT, env=clean_environment(),
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs are finished" in done.stdout
    assert "gqa_seed0: starts" not in done.stderr
    for run, starts in ((first, 2), (second, 2)):
        assert [one["step"] for one in read_metrics(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
        assert (output / f"{run.name}.log").read_text().count("parameters (") == starts
    assert json.loads((first / "metrics.jsonl").read_text().splitlines()[0])["memory_bytes"] > 50e6

    compare(str(output))
    assert "| mqa | 1 | " in capsys.readouterr().out
    report(str(first), samples=1, prompt="1+")
    page = (first / "report.html").read_text()
    assert f"The checkpoint of step {STEPS}" in page
    assert "<pre>1+" in page


STUB = """
for word in "$@"; do case $word in --output=*) folder=${word#--output=} ;; --name=*) name=${word#--name=} ;; esac; done
echo "$name" >>"$CALLS"
case $name in
  gqa_*) echo "error: boom"; exit 2 ;;
  *) mkdir -p "$folder"; touch "$folder/done" ;;
esac
"""


@pytest.fixture
def launcher(tmp_path, monkeypatch) -> str:
    """A launcher that fails for one variant and is quick for the other."""
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(processes, "is_finished", lambda one: (one.folder / "done").exists())
    (tmp_path / "stub.sh").write_text(STUB)
    return f"bash {tmp_path / 'stub.sh'}"


def test_a_failed_run_is_told_at_the_end(sheet, launcher, tmp_path, capsys):
    planned = plan_runs(read_spec(SweepConfig, sheet), {}, tmp_path / "out")
    outcomes = processes.run_all(planned, launcher)
    assert [outcome.state for outcome in outcomes] == ["failed", "finished"]
    with pytest.raises(SystemExit) as ended:
        tell(outcomes, tmp_path / "out")
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "1 of 2 runs are finished" in printed.out
    assert "failed: gqa_seed0: exit code 2 at step 0: error: boom" in printed.err
    assert str(tmp_path / "out" / "gqa_seed0.log") in printed.err
    again = processes.run_all(planned, launcher)
    assert [outcome.state for outcome in again] == ["failed", "finished"]
    assert (tmp_path / "calls").read_text().split() == ["gqa_seed0", "mqa_seed0", "gqa_seed0"]


def test_a_launcher_that_is_not_there(sheet, tmp_path):
    planned = plan_runs(read_spec(SweepConfig, sheet), {}, tmp_path / "out")
    with pytest.raises(UserError, match="--launcher 'no_such_program': no such program"):
        processes.run_all(planned, "no_such_program")


def test_launchers_are_those_of_the_interpreter(sheet, launcher, tmp_path, monkeypatch):
    """Also where its environment is not activated, and PATH leads to another python."""
    other = tmp_path / "other" / "python"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{other.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "stub.sh").write_text('command -v python >>"$CALLS"; exit 1')
    processes.run_all(plan_runs(read_spec(SweepConfig, sheet), {}, tmp_path / "out"), launcher)
    found = (tmp_path / "calls").read_text().split()
    assert {Path(path).parent for path in found} == {Path(sys.executable).parent}


def test_the_port_is_a_number(sheet, launcher, tmp_path):
    (tmp_path / "stub.sh").write_text('echo "$1" >>"$CALLS"; exit 1')
    processes.run_all(plan_runs(read_spec(SweepConfig, sheet), {}, tmp_path / "out"), f"{launcher} {{port}}")
    assert all(1024 < int(port) < 65536 for port in (tmp_path / "calls").read_text().split())


def test_the_last_step_is_that_of_the_last_whole_record(sheet, tmp_path):
    one = plan_runs(read_spec(SweepConfig, sheet), {}, tmp_path)[0]
    assert processes.last_step(one) == 0
    long = {"layers.0": {"load": list(range(30_000))}}
    write_run(one.folder, [record(i, 2.0) | ({"experts": long} if i % 2 else {}) for i in range(1, 6)])
    assert processes.last_step(one) == 5
    with open(RunFolder(one.folder).metrics, "a") as file:
        file.write('{"step": 6, "tokens": 1')
    assert processes.last_step(one) == 5


def test_slurm_writes_only_what_is_left(sheet, launcher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mosaic_dist.compare.sweep.is_finished", processes.is_finished)
    monkeypatch.setattr("mosaic_dist.compare.sweep.check_data", lambda run: None)
    (tmp_path / "out" / "gqa_seed0").mkdir(parents=True)
    (tmp_path / "out" / "gqa_seed0" / "done").touch()
    sweep(str(sheet), output=str(tmp_path / "out"), slurm=True)
    assert capsys.readouterr().out == f"1 runs: sbatch {tmp_path}/out/sweep.sh\n"
    assert "gqa_seed0" not in (tmp_path / "out" / "sweep.sh").read_text()
    assert not (tmp_path / "calls").exists()
