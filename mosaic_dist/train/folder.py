"""The run folder: everything that a run leaves behind, and the proof that it is this run's."""

import contextlib
import fcntl
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mosaic_dist.checkpoint import refuse_foreign
from mosaic_dist.errors import UserError
from mosaic_dist.files import ASIDE, write_atomic
from mosaic_dist.run_spec import ENVIRONMENT_JSON, Run, differences, listing, read_run

PACKAGES = ("mosaic-dist", "torch", "deepspeed", "mosaicml-streaming", "tokenizers", "safetensors", "numpy")
BEFORE_RUN_YAML = {"checkpoints", ".lock", "slurm", ".doctor"}


class RunFolder:
    """Paths of a run folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.run_yaml = self.path / "run.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.loss_plot = self.path / "loss.png"
        self.experts_plot = self.path / "experts.png"
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer.json"

    def claim(self, run: Run) -> None:
        """Make the folder, or check that what is in it is the same experiment. Only one process may hold it.

        Raises UserError when the folder belongs to another run, is in use, or holds other files.
        """
        if self.run_yaml.exists():
            found = list(differences(read_run(self.run_yaml), run))
            if found:
                raise UserError(f"{self.path} holds another run; choose another --output.{listing(found)}")
        elif self.path.exists() and not self._is_barely_begun():
            refuse_foreign(self.path)
            raise UserError(f"{self.path} is not empty and holds no run.yaml; choose another --output")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock()
        for path in self.path.iterdir():
            if ASIDE.fullmatch(path.name):  # of a start that was killed
                path.unlink()

    def _is_barely_begun(self) -> bool:
        """Whether nothing is there but what a start leaves that ended before it wrote run.yaml, and SLURM's logs."""
        names = {path.name for path in self.path.iterdir()} - BEFORE_RUN_YAML
        return all(ASIDE.fullmatch(name) for name in names) and not (
            self.checkpoints.exists() and any(self.checkpoints.iterdir())
        )

    def _lock(self) -> None:
        lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is in use by another process that trains in it") from None
        except OSError:  # a file system without locks
            return
        self._lock_file = lock

    def describe(self, run: Run, config: dict[str, Any], facts: dict[str, Any], tokenizer: Path) -> None:
        """Write the resolved run, the DeepSpeed config, the environment and the tokenizer."""
        write_atomic(self.run_yaml, run.to_yaml())
        write_atomic(self.path / "ds_config.json", json.dumps(config, indent=2) + "\n")
        write_atomic(self.path / ENVIRONMENT_JSON, json.dumps(environment() | facts, indent=2) + "\n")
        diff = _git("diff", "HEAD")
        if diff:
            write_atomic(self.path / "git.diff", diff + "\n")
        if not self.tokenizer.exists():
            write_atomic(self.tokenizer, tokenizer.read_bytes())


def environment() -> dict[str, Any]:
    """Versions, hardware, command and git state of this process."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": versions,
        "host": platform.node(),
        "device": device,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_clean": _git("status", "--porcelain") == "",
    }


def _git(*words: str) -> str | None:
    """Output of a git command on the folder of this package's sources; None where that is no repository."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
