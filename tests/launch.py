"""Real processes for tests: N ranks of a module that talk over gloo, under a hard time limit."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mosaic_dist.parallel.world import free_port
from mosaic_dist.train.metrics import read_metrics
from tests.prepared import ROOT as ROOT
from tests.prepared import PreparedProcess


def clean_environment() -> dict[str, str]:
    """The environment without traces of a launcher, one thread per process."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return kept | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def has_come(folder: Path, step: int) -> bool:
    """Whether a run has told of a step and has a checkpoint, which is written beside the steps."""
    there = any((folder / "checkpoints").glob("step_*"))
    return there and any(record["step"] >= step for record in read_metrics(folder / "metrics.jsonl"))


def start_ranks(program: str, ranks: int, *words: str, folder: Path) -> list[PreparedProcess]:
    """Start a module, or a script (*.py), as the ranks of one world; their outputs are folder/0, folder/1 ..."""
    start = [program] if program.endswith(".py") else ["-m", program]
    address = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    address["MASTER_PORT"] = str(free_port())
    return [
        PreparedProcess(
            [*start, *words],
            clean_environment() | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            folder / str(rank),
        )
        for rank in range(ranks)
    ]


def run_ranks(program: str, ranks: int, *words: str, timeout: float = 240) -> list[subprocess.CompletedProcess[str]]:
    """Run a module, or a script, as the ranks of one world, and wait. When one fails, the others are killed."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start_ranks(program, ranks, *words, folder=Path(folder))
        deadline = time.monotonic() + timeout
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        if any(p.poll() != 0 for p in processes):
            deadline = time.monotonic() + 2.0  # the others may be about to end by themselves
            while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
                time.sleep(0.02)
        for process in processes:
            process.kill()
        return [
            subprocess.CompletedProcess(process.args, process.wait(), (Path(folder) / str(rank)).read_text())
            for rank, process in enumerate(processes)
        ]


def run_python(*words: str | Path, timeout: float = 180, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python words...` in the repository, or a copy of it, and wait."""
    with tempfile.NamedTemporaryFile("r") as output:
        environment = clean_environment()
        paths = filter(None, (environment.get("PYTHONPATH"), str(root)))
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        process = PreparedProcess([str(word) for word in words], environment, Path(output.name), root)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, code, output.read())


def check(done: list[subprocess.CompletedProcess[str]]) -> str:
    """Output of rank 0, after making sure that no rank failed."""
    for rank, process in enumerate(done):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{process.stdout[-4000:]}"
    return done[0].stdout
