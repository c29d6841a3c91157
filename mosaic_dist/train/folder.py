"""The run folder: everything that a run leaves behind, and the proof that it is this run's."""

import contextlib
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mosaic_dist.checkpoint import refuse_foreign, refuse_unknown_formats
from mosaic_dist.credentials import mask
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.files import ASIDE, check_output_directory, write_atomic
from mosaic_dist.run_spec import ENVIRONMENT_JSON, Run, differences, listing, read_run
from mosaic_dist.train.lock import FolderLock, Holder

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
        self.lock = FolderLock(self.path / ".lock")

    def claim(self, run: Run) -> Holder | None:
        """Make the folder, or check that what is in it is the same experiment. Only one process may hold it.

        Returns the process that still holds it, where that is an earlier start of the same SLURM job: try again; None
        where it is claimed. Raises UserError when the folder belongs to another run, is in use, holds other files, or
        holds a checkpoint of another format.
        """
        check_output_directory(self.path)
        refuse_unknown_formats(self.checkpoints)
        if self.run_yaml.exists():
            found = list(differences(read_run(self.run_yaml), run))
            if found:
                raise UserError(f"{self.path} holds another run; choose another --output.{listing(found)}")
        elif self.path.exists() and not self._is_barely_begun():
            refuse_foreign(self.path)
            raise UserError(f"{self.path} is not empty and holds no run.yaml; choose another --output")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        holder = self.lock.acquire()
        if holder is None:
            for path in self.path.iterdir():
                if ASIDE.fullmatch(path.name):  # of a start that was killed
                    path.unlink()
        return holder

    def _is_barely_begun(self) -> bool:
        """Whether nothing is there but what a start leaves that ended before it wrote run.yaml, and SLURM's logs."""
        names = {path.name for path in self.path.iterdir()} - BEFORE_RUN_YAML
        return all(ASIDE.fullmatch(name) for name in names) and not (
            self.checkpoints.exists() and any(self.checkpoints.iterdir())
        )

    def describe(self, run: Run, config: dict[str, Any], facts: dict[str, Any], tokenizer: Path) -> None:
        """Write the resolved run, the DeepSpeed config, the environment and the tokenizer; credentials are masked."""
        write_atomic(self.run_yaml, run.to_yaml())
        write_atomic(self.path / "ds_config.json", mask(json.dumps(config, indent=2)) + "\n")
        write_atomic(self.path / ENVIRONMENT_JSON, json.dumps(environment() | facts, indent=2) + "\n")
        diff = _git("diff", "HEAD")
        if diff:
            write_atomic(self.path / "git.diff", mask(diff) + "\n")
        if not self.tokenizer.exists():
            Tokenizer.load(tokenizer).save(self.path)


def environment() -> dict[str, Any]:
    """Versions, hardware, command (with credentials masked) and git state of this process."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "command": [mask(word) for word in sys.argv],
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
