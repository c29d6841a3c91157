"""Real processes for tests: N ranks of a module that talk over gloo, under a hard time limit."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from mosaic_dist.parallel.world import free_port
from mosaic_dist.train.metrics import read_metrics

ROOT = Path(__file__).parent.parent


def clean_environment() -> dict[str, str]:
    """The environment without traces of a launcher, one thread per process."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return kept | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def has_come(folder: Path, step: int) -> bool:
    """Whether a run has told of a step and has a checkpoint, which is written beside the steps."""
    there = any((folder / "checkpoints").glob("step_*"))
    return there and any(record["step"] >= step for record in read_metrics(folder / "metrics.jsonl"))


def run_ranks(module: str, ranks: int, *words: str, timeout: float = 240) -> list[subprocess.CompletedProcess[str]]:
    """Run `python -m module words...` as so many ranks and wait. When one fails, the others are killed."""
    port = str(free_port())
    processes = []
    told = [tempfile.TemporaryFile("w+") for _ in range(ranks)]  # noqa: SIM115 - not pipes, which hold up when full
    for rank in range(ranks):
        settings = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        environment = clean_environment() | settings | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *words],
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=told[rank],
                stderr=subprocess.STDOUT,
            )
        )
    deadline = time.monotonic() + timeout
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    failed = any(p.poll() != 0 for p in processes)
    time.sleep(2.0 if failed else 0.0)  # the others may be about to end by themselves
    for process in processes:
        if process.poll() is None:
            process.kill()
    return [_ended(process, output) for process, output in zip(processes, told, strict=True)]


def _ended(process: subprocess.Popen[str], told: IO[str]) -> subprocess.CompletedProcess[str]:
    process.wait()
    with told:
        told.seek(0)
        return subprocess.CompletedProcess(process.args, process.returncode, told.read())


def check(done: list[subprocess.CompletedProcess[str]]) -> str:
    """Output of rank 0, after making sure that no rank failed."""
    for rank, process in enumerate(done):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{process.stdout[-4000:]}"
    return done[0].stdout
