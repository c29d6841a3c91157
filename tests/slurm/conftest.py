"""One cluster for all tests of this folder, and a tiny training job on it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.tokenizer import train_bpe
from mosaic_dist.train.metrics import read_metrics
from tests.data.conftest import make_documents
from tests.launch import ROOT
from tests.slurm.cluster import Cluster, running, wait_until, why_not

SMALL = "--nodes=2 --gpus-per-node=1 --cpus-per-task=1 --time=20".split()
"""What these tests change in the header of a job script; all else is as it stands there."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Three nodes: two for a job and one to spare."""
    if reason := why_not():
        pytest.skip(f"no SLURM here: {reason}")
    with running(tmp_path_factory.mktemp("slurm"), 3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    documents = make_documents(300)
    path = tmp_path_factory.mktemp("data") / "set"
    prepare(documents, train_bpe(documents, 300), path, 16, validation_fraction=0.2, workers=1)
    return path


@dataclass
class Job:
    """A job of the tiny model, in a folder of its own."""

    cluster: Cluster
    folder: Path
    data: Path
    number: str = ""

    def submit(self, *words: str, options: tuple[str, ...] = (), **settings: str) -> None:
        """Hand it in."""
        defaults = {
            "RECIPE": "tests/slurm/held.py",
            "HOLD": str(self.folder / "hold"),
            "DATA": str(self.data),
            "OUTPUT": str(self.output),
            "EXPERT_PARALLEL": "2",
            "DOCTOR": "0",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'recipes'}",
            "LEAVE_SECONDS": "10",
        }
        log = f"--output={self.folder / 'job.log'}"
        script = (*SMALL, *options, log, "slurm/gptoss_20b.sh", *words)
        self.number = self.cluster.submit(*script, settings=defaults | settings)

    @property
    def output(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def hold(self, step: int) -> None:
        """Let it wait before a step, where it is not there yet; 0: let it go on."""
        aside = self.folder / "hold.next"
        aside.write_text(str(step))
        os.replace(aside, self.folder / "hold")

    def log(self) -> str:
        """What the batch shell has said."""
        path = self.folder / "job.log"
        return path.read_text() if path.exists() else ""

    def all_logs(self) -> str:
        """Everything that the job has said."""
        paths = [self.folder / "job.log", *sorted((self.output / "slurm").rglob("*.log"))]
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in paths if path.exists())

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is in the metrics and its checkpoint, where it has one, is whole."""
        saved = self.output / "checkpoints" / f"step_{step // 2 * 2:08d}"
        metrics = self.output / "metrics.jsonl"

        def has_come() -> bool:
            self.check_alive()
            return any(record["step"] >= step for record in read_metrics(metrics)) and saved.exists()

        wait_until(has_come, 300, f"step {step}")

    def check_alive(self) -> None:
        """AssertionError where SLURM has ended it for good."""
        assert self.state() not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), self.all_logs()

    def state(self) -> str:
        """SLURM's word for it."""
        return self.cluster.job(self.number)["JobState"]

    def wait_for_restart(self, count: int) -> None:
        """Wait until it was requeued so many times."""
        wait_until(lambda: int(self.cluster.job(self.number)["Restarts"]) >= count, 180, f"restart {count}")

    def wait_for_end(self) -> None:
        """Wait until it is done, well."""

        def is_done() -> bool:
            self.check_alive()
            return self.state() == "COMPLETED"

        wait_until(is_done, 300, "the end")


@pytest.fixture
def job(cluster, dataset, tmp_path) -> Iterator[Job]:
    made = Job(cluster, tmp_path, dataset)
    yield made
    if made.number and made.state() not in ("COMPLETED", "FAILED", "CANCELLED"):
        cluster.run("scancel", made.number)
