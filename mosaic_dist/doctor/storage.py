"""Whether the run folder is the same place for all nodes, and fast."""

import contextlib
import os
import shutil
import time
from pathlib import Path

from mosaic_dist.doctor.check_result import CheckResult, judge
from mosaic_dist.doctor.rank_group import RankGroup
from mosaic_dist.files import checksum

PROBE_BYTES = 64 << 20
VISIBLE_SECONDS = 20.0
"""NFS tells other nodes of a new file some seconds late."""
WARN_MB_PER_SECOND, FAIL_MB_PER_SECOND = 100.0, 5.0
PROBES = ".doctor"
"""Folder of the probes, in the run folder."""


def check_storage(party: RankGroup, folder: Path) -> CheckResult:
    """Whether the first rank of each node can write there, at which speed, and the next node reads it unchanged.

    Every rank must call. Makes the folder where there is none, and leaves nothing in it.
    """
    world = party.world
    writes, nodes = world.local_rank == 0, max(1, world.size // world.local_size)
    mine = folder / PROBES / f"rank_{world.rank}"
    following = folder / PROBES / f"rank_{(world.rank // world.local_size + 1) % nodes * world.local_size}"
    rate, digest, problem = _write(mine) if writes else (float("inf"), "", None)
    told = party.gather((rate, digest, problem))
    if problem is None and writes:
        expected = told[int(following.name.removeprefix("rank_"))]
        problem = None if expected[2] else _read(following, expected[1])
    problems = party.gather(problem)
    if world.is_main:
        shutil.rmtree(folder / PROBES, ignore_errors=True)
    limit = f"one folder for all, at least {WARN_MB_PER_SECOND:g} MB/s"
    for rank, text in enumerate(problems):
        if text:
            fix = "choose an --output on a file system that all nodes mount, writable for this user"
            return CheckResult("storage", "fail", f"{party.name(rank)}: {text}", limit, fix)
    rank = min(range(world.size), key=lambda i: told[i][0])
    rate = told[rank][0]
    verdict = judge(rate >= WARN_MB_PER_SECOND, rate >= FAIL_MB_PER_SECOND)
    fix = "checkpoints will take long: another file system, or raise checkpoint.every_steps"
    return CheckResult("storage", verdict, f"slowest: {rate:.0f} MB/s, {party.name(rank)}", limit, fix)


def _write(path: Path) -> tuple[float, str, str | None]:
    """Speed in MB/s, the checksum of what was written, and what went wrong."""
    data = os.urandom(1 << 20) * (PROBE_BYTES >> 20)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return len(data) / 1e6 / (time.monotonic() - started), checksum(path), None
    except OSError as error:
        return 0.0, "", f"cannot write in {path.parent.parent}: {error.strerror}"


def _read(path: Path, digest: str) -> str | None:
    """What is wrong with the file of another node."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    found = "does not see"
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if checksum(path) == digest:
                return None
            found = "reads other bytes than were written in"
        time.sleep(0.2)
    return f"{found} {path}, which another node has written"
