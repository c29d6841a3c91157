"""One launch of a training run: its processes, what lies in its folder at this moment, and how it ends."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mosaic_dist.parallel.world import free_port
from mosaic_dist.train.folder import RunFolder

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/t4_moe.py"
MARK = "CHAOS_JOB"
"""A variable that all processes of a launch inherit, whoever their parents are: with a value of its own each time."""
LOOK_SECONDS = 0.02
LONGEST_END_SECONDS = 120.0

LAUNCHERS = {
    "deepspeed": "deepspeed --master_port {port} --num_gpus {ranks}",
    "torchrun": "torchrun --master-port={port} --nproc-per-node {ranks}",
}


class Ending(NamedTuple):
    """How long the processes of a launch stayed."""

    ranks_seconds: float
    """Until all ranks and their readers were gone: then the folder, the memory and the devices are free."""
    seconds: float
    """Until the launchers were gone, too."""


class Process(NamedTuple):
    """A living process of a launch. The reader of a rank has its number too, a launcher has none."""

    id: int
    rank: int | None
    is_reader: bool


@dataclass(frozen=True)
class Names:
    """What this launch has in the folder of the checkpoints; what earlier ones left behind is not told."""

    complete: int
    """The newest checkpoint that has its name, whoever wrote it; 0 for none."""
    is_saving: bool
    is_deleting: bool


class Job:
    """A launch of the recipe in a run folder, from the checkpoint of step `first` on. Starts at once.

    What it prints goes to `log`. Its processes are found by their environment (Linux only), so none can hide.
    """

    def __init__(self, launcher: str, ranks: int, words: list[str], folder: Path, log: Path, first: int):
        self.folder, self.first, self.log = RunFolder(folder), first, log
        self.mark = f"{MARK}={uuid.uuid4().hex}"
        self._old_metrics = self._metrics_id()
        self._started_ns = time.time_ns()
        start = LAUNCHERS[launcher].format(port=free_port(), ranks=ranks).split()
        places = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),  # the sources beside this file, wherever the package is installed
            "TMPDIR": str(temporary_files(folder.parent)),
        }
        with open(log, "w") as output:
            self.launcher = subprocess.Popen(
                [*start, RECIPE, "--output", str(folder), *words],
                cwd=ROOT,
                env=os.environ | places | {"OMP_NUM_THREADS": "1", MARK: self.mark.partition("=")[2]},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[Process]:
        """All that live, launchers first."""
        found, parents = {}, {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                variables = (path / "environ").read_bytes().split(b"\0")
                if self.mark.encode() in variables:
                    rank = next((int(word[5:]) for word in variables if word.startswith(b"RANK=")), None)
                    if rank is None or RECIPE.encode() in (path / "cmdline").read_bytes():
                        found[int(path.name)] = rank
                        parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        processes = [
            Process(number, rank, rank is not None and found.get(parents[number]) is not None)
            for number, rank in found.items()
        ]
        return sorted(processes, key=lambda process: (process.rank is not None, process.id))

    def ranks(self) -> list[Process]:
        """The processes that train, by rank."""
        return sorted(
            (p for p in self.processes() if p.rank is not None and not p.is_reader), key=lambda p: p.rank or 0
        )

    def readers(self) -> list[Process]:
        """The processes that read data for them."""
        return [process for process in self.processes() if process.is_reader]

    def shared_memory(self) -> set[str]:
        """Files in /dev/shm that its processes have open or mapped and that still have a name."""
        found: set[str] = set()
        for process in self.processes():
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{process.id}/maps").read_text().splitlines()
                opened = [os.readlink(path) for path in Path(f"/proc/{process.id}/fd").iterdir()]
                found.update(re.findall(r"/dev/shm/\S+$", "\n".join(maps + opened), re.MULTILINE))
        return found

    def names(self) -> Names:
        """What lies there now; costs some microseconds."""
        complete, is_saving, is_deleting = 0, False, False
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder.checkpoints) as entries:
            for entry in entries:
                if entry.name.startswith("step_"):
                    complete = max(complete, int(entry.name[5:]))
                elif entry.name.endswith((".tmp", ".deleting")):
                    with contextlib.suppress(FileNotFoundError):
                        if entry.stat().st_ctime_ns >= self._started_ns:
                            is_saving |= entry.name.endswith(".tmp")
                            is_deleting |= entry.name.endswith(".deleting")
        return Names(complete, is_saving, is_deleting)

    def steps_done(self) -> int:
        """How many steps of this launch are in the metrics."""
        if self._metrics_id() == self._old_metrics:
            return 0
        return max(0, last_step(self.folder.metrics) - self.first)

    def _metrics_id(self) -> int | None:
        """A start of the run replaces the file, so its number changes."""
        with contextlib.suppress(FileNotFoundError):
            return self.folder.metrics.stat().st_ino
        return None

    def is_over(self) -> bool:
        """Whether the launcher has ended by itself."""
        return self.launcher.poll() is not None

    def wait_until_gone(self) -> Ending:
        """Wait until no process is left. What is still there after LONGEST_END_SECONDS is killed."""
        started, ranks_gone = time.monotonic(), None
        while left := self.processes():
            seconds = time.monotonic() - started
            if ranks_gone is None and all(process.rank is None for process in left):
                ranks_gone = seconds
            if seconds > LONGEST_END_SECONDS:
                kill(left)
            self.launcher.poll()
            time.sleep(LOOK_SECONDS)
        self.launcher.wait()
        seconds = time.monotonic() - started
        return Ending(seconds if ranks_gone is None else ranks_gone, seconds)

    def began_at(self) -> int | None:
        """The step that the run said it starts from; None if it did not come so far."""
        found = re.search(r"; steps (\d+) to \d+ of ", self.log.read_text(errors="replace"))
        return int(found[1]) if found else None


def kill(processes: list[Process]) -> int:
    """SIGKILL, to one after the other; returns how many were still there."""
    killed = 0
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.id, signal.SIGKILL)
            killed += 1
    return killed


def last_step(metrics: Path) -> int:
    """Step of the last whole line of a metrics file that may be being written; 0 if there is none."""
    found = re.findall(rb'^\{"step": (\d+).*\}\n', metrics.read_bytes(), re.MULTILINE) if metrics.exists() else []
    return int(found[-1]) if found else 0


def temporary_files(work: Path) -> Path:
    """Where the launches put their temporary files, so that what they leave there can be told."""
    path = work / "tmp"
    path.mkdir(exist_ok=True)
    return path
