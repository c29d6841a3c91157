"""One process at a time in a run folder."""

import fcntl
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from mosaic_dist.errors import UserError


class FolderInUse(UserError):
    """An earlier start of the same SLURM job did not let go of the folder. Another start may succeed."""

    exit_code = 1


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder."""

    host: str
    process: int
    slurm_job: str | None
    slurm_restarts: int
    """How often SLURM had requeued the job."""

    @classmethod
    def this(cls) -> "Holder":
        """This process."""
        job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return cls(socket.gethostname(), os.getpid(), job, restarts)

    def is_earlier_start_of(self, other: "Holder") -> bool:
        """Whether SLURM has requeued this process's job since, and the other one belongs to the new start."""
        same_job = self.slurm_job is not None and self.slurm_job == other.slurm_job
        return same_job and self.slurm_restarts < other.slurm_restarts

    def __str__(self) -> str:
        job = "" if self.slurm_job is None else f", start {self.slurm_restarts + 1} of SLURM job {self.slurm_job}"
        return f"process {self.process} on {self.host}{job}"


class FolderLock:
    """A lock on a folder, held until the process ends."""

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self) -> Holder | None:
        """Take the lock and return None, or return who has it: an earlier start of this SLURM job, worth waiting for.

        SLURM requeues a job when it has lost a node, but the processes of that node may still run and write. Raises
        UserError where any other process has the lock.
        """
        file = open(self.path, "a+")  # noqa: SIM115 - held until the process ends; not "w", which would erase the holder
        me = Holder.this()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(file)
            file.close()
            if holder is not None and holder.is_earlier_start_of(me):
                return holder
            raise UserError(
                f"{self.path.parent} is in use by another process that trains in it: {holder or 'which one is unknown'}"
            ) from None
        except OSError:  # a file system without locks
            file.close()
            return None
        file.truncate(0)
        file.write(json.dumps(asdict(me)))
        file.flush()
        os.fsync(file.fileno())  # for other nodes
        self._file = file
        return None


def _read(file: IO[str]) -> Holder | None:
    """Who has the lock; None where it has not written that yet."""
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None
