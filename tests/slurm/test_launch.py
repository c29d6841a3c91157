"""The job scripts and what they do with exit codes and signals, with programs in the place of a training."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.slurm.cluster import wait_until
from tests.slurm.conftest import Job

SCRIPTS = {"gptoss_20b": "recipes/gptoss_20b.py", "gptoss_120b": "recipes/gptoss_120b.py"}
SCRIPTS |= {"mosaic_small": "recipes/mosaic_small.py"}

FAILS = """
import json, os, sys, time
folder, rank = sys.argv[sys.argv.index("--output") + 1], os.environ["RANK"]
if os.environ["CODE"] == "2":
    sys.exit(2)
if rank == "3":
    print(json.dumps({"step": 7}), file=open(folder + "/metrics.jsonl", "a"))
    sys.exit(int(os.environ["CODE"]))
time.sleep(600)
"""
SAVES = """
import os, signal
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
print("listening", flush=True)
while True:
    signal.pause()
"""


def submit(job: Job, program: str, *options: str, **settings: str) -> None:
    """Hand in a job of two ranks on each of two nodes that run this program."""
    path = job.folder / "program.py"
    path.write_text(program)
    job.submit(options=("--gpus-per-node=2", *options), RECIPE=str(path), LEAVE_SECONDS="2", **settings)


def wait_for(job: Job, state: str) -> None:
    wait_until(lambda: job.state() == state, 120, state)


def test_failures_at_one_step_end_the_job(job):
    """One rank fails while the others hang: they are ended, and after the second time the job gives up."""
    submit(job, FAILS, MAX_FAILURES="2", CODE="1")
    wait_for(job, "FAILED")
    told = job.log()
    assert re.findall(r"start \d, from step 0, \d failures there", told) == [
        "start 1, from step 0, 0 failures there",
        "start 2, from step 0, 1 failures there",
    ]
    assert "2 starts in a row have failed after step 0 (the last one got to step 7)" in told
    assert job.cluster.job(job.number)["Restarts"] == "1"
    agent = (job.output / "slurm" / f"{job.number}.2" / "node_1_node2.log").read_text()
    assert "[agent of node2] local rank 1 ended with exit code 1" in agent


def test_wrong_words_are_not_tried_again(job):
    submit(job, FAILS, CODE="2")
    wait_for(job, "FAILED")
    assert "the settings or the data are wrong, and would be again" in job.log()
    assert job.cluster.job(job.number)["Restarts"] == "0"


def test_a_signal_starts_the_job_again_but_cancelling_does_not(job):
    """A program that is told to stop before it listens gets the signal again when it does."""
    submit(job, SAVES)

    def is_listening(start: int) -> bool:
        logs = (job.output / "slurm" / f"{job.number}.{start}").glob("node_*")
        return sum(path.read_text().count("listening") for path in logs) == 4

    wait_until(lambda: "meeting at" in job.log(), 60, "the batch shell")
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for_restart(1)
    wait_until(lambda: is_listening(2), 60, "the second start")
    assert re.search(r"told to stop \d+ s after the start, before it had saved a step", job.log())
    job.cluster.run("scancel", job.number)
    wait_for(job, "CANCELLED")
    assert "time limit" not in job.log().partition("requeued")[2]
    assert job.log().count("requeued") == 1
    assert job.cluster.job(job.number)["Restarts"] == "1"


def test_a_time_limit_shorter_than_the_lead_of_the_signal(job):
    """SLURM tells every start to stop at once. It was requeued for ever."""
    submit(job, SAVES, "--time=1", "--signal=B:USR1@120", MAX_FAILURES="1")
    wait_for(job, "FAILED")
    told = job.log()
    assert "the time limit (00:01:00) is shorter than the lead of --signal" in told, told
    assert "1 starts in a row have failed after step 0" in told
    assert job.cluster.job(job.number)["Restarts"] == "0"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_job_script(cluster, name):
    """It is thin, says what SLURM needs to know, and SLURM takes it."""
    text = (ROOT / "slurm" / f"{name}.sh").read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert {"nodes", "gpus-per-node", "time", "requeue", "signal", "output"} <= set(directives)
    assert directives["signal"].startswith("B:USR1@")
    assert f"RECIPE={'${RECIPE:-' + SCRIPTS[name]}}}" in text
    assert (ROOT / SCRIPTS[name]).exists()
    assert text.count("\n") <= 20
    assert "to start at" in cluster.run("sbatch", "--test-only", "--nodes=1", f"slurm/{name}.sh")


def test_a_job_script_as_it_stands(cluster, tmp_path):
    """But for the number of ranks: a dry run of the recipe on a whole node."""
    settings = {"RANKS_PER_NODE": "1", "DOCTOR": "0", "OUTPUT": str(tmp_path / "run")}
    log = tmp_path / "job.log"
    job = cluster.submit(f"--output={log}", "slurm/mosaic_small.sh", "--dry_run", "--seed", "7", settings=settings)
    wait_until(lambda: cluster.job(job)["JobState"] == "COMPLETED", 120, "the end")
    (told,) = [path.read_text() for path in (tmp_path / "run" / "slurm" / f"{job}.1").glob("node_0_*.log")]
    assert "layout: 1 ranks" in told
    assert "seed: 7" in told
    assert "ZeRO 1" in told


def scripts() -> list[Path]:
    return [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian: shellcheck)")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", *scripts()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_syntax(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
