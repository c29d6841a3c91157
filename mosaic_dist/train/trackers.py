"""Services that take metrics besides metrics.jsonl: W&B, TensorBoard."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy

from mosaic_dist.errors import UserError
from mosaic_dist.files import write_atomic
from mosaic_dist.run_spec import Run


class Tracker(Protocol):
    """A service that takes metrics."""

    def write(self, step: int, values: Mapping[str, float], loads: Mapping[str, Sequence[int]]) -> None:
        """Record numbers of a step, and of layers how the loads of their experts are distributed, as histograms."""


def make_trackers(run: Run, folder: Path) -> list[Tracker]:
    """The trackers that a run asks for. UserError where a package is missing."""
    makers: dict[str, Callable[[Run, Path], Tracker]] = {"wandb": WandbTracker, "tensorboard": TensorboardTracker}
    return [makers[name](run, folder) for name in run.logging.trackers]


class WandbTracker:
    """Weights & Biases; offline unless WANDB_MODE says otherwise, so that it never asks for a login."""

    def __init__(self, run: Run, folder: Path):
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # takes seconds, and most runs do without

        id_file = folder / "wandb_id"
        self.run = wandb.init(
            project=run.logging.project,
            name=run.name,
            id=id_file.read_text() if id_file.exists() else None,
            resume="allow",
            dir=str(folder),
            config=run.to_dict(),
        )
        self.histogram = wandb.Histogram
        write_atomic(id_file, self.run.id)

    def write(self, step: int, values: Mapping[str, float], loads: Mapping[str, Sequence[int]]) -> None:
        """See `Tracker`."""
        self.run.log({**values, **{name: self.histogram(load) for name, load in loads.items()}}, step=step)


class TensorboardTracker:
    """TensorBoard event files in the run folder."""

    def __init__(self, run: Run, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "the tracker 'tensorboard' needs its package: pip install 'mosaic-dist[tensorboard]'"
            ) from None
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float], loads: Mapping[str, Sequence[int]]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        for name, load in loads.items():
            self.writer.add_histogram(name, numpy.array(load), step)
