"""A rank that fails in the middle of a step: the job ends in time, says what was first, and leaves nothing behind."""

import re
import time
from pathlib import Path

import pytest

from mosaic_dist.parallel.world import free_port
from tests.end_to_end.conftest import SMALL, command
from tests.end_to_end.failing import FAULT_SAYS

SECONDS = 30
LAUNCHERS = {
    "deepspeed": ("deepspeed", "--master_port={port}", "--num_gpus", "2", "--module"),
    "torchrun": ("torchrun", "--master-port={port}", "--nproc-per-node", "2", "-m"),
}


def left_behind(word: str) -> list[str]:
    """Processes that have a word in their command line."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended
            continue
    return [line for line in lines if word in line]


@pytest.mark.parametrize(
    ("launcher", "fault", "rank"),
    [
        ("deepspeed", "raise", 1),
        ("deepspeed", "kill", 0),
        ("torchrun", "raise", 0),
        ("torchrun", "kill", 1),
    ],
)
def test_the_job_ends(dataset, tmp_path, monkeypatch, launcher, fault, rank):
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("FAULT_RANK", str(rank))
    folder = tmp_path / "run"
    start = [word.format(port=free_port()) for word in LAUNCHERS[launcher]]
    words = ["tests.end_to_end.failing", "--data", str(dataset), "--output", str(folder), *SMALL]
    done = command(*start, *words, timeout=120)
    ended = time.time()
    assert done.returncode != 0, done.stdout[-3000:]
    (fault_time,) = re.findall(rf"{FAULT_SAYS}([\d.]+)", done.stdout)
    assert ended - float(fault_time) < SECONDS
    assert not left_behind(str(folder))
    if fault == "raise":
        assert done.stdout.count("failed first:") == 1
        assert re.search(rf"\[rank {rank} on .*\] failed first:", done.stdout)
        assert "RuntimeError: the experts of this rank are broken" in done.stdout
    else:
        # the launcher tells of the killed one, or the other rank of the connection that it lost, whoever is first
        assert re.search(r"return code = -9|exitcode +: -9|Connection (closed|reset) by peer", done.stdout)
