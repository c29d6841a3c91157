"""Services that take metrics besides metrics.jsonl: W&B, TensorBoard. None of them can hold up or end a run."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy

from mosaic_dist.errors import UserError
from mosaic_dist.files import write_atomic
from mosaic_dist.run_spec import Run

INIT_SECONDS = 15
"""How long W&B may look for its server at the start of a run, unless WANDB_INIT_TIMEOUT says otherwise."""
FINISH_SECONDS = 60
"""How long W&B may send what is left at the end, unless WANDB_FINISH_TIMEOUT says otherwise."""
GRACE_SECONDS = 10.0
"""For a service to keep to its own limit."""


class Tracker(Protocol):
    """A service that takes metrics."""

    def write(self, step: int, values: Mapping[str, float], loads: Mapping[str, Sequence[int]]) -> None:
        """Record numbers of a step, and of layers how the loads of their experts are distributed, as histograms."""

    def go_back(self, step: int) -> None:
        """The steps after this one are done anew."""

    def close(self, plots: Sequence[Path]) -> None:
        """Take the pictures, and bring everything to where it is kept."""


def make_trackers(run: Run, folder: Path) -> list[Tracker]:
    """The trackers that a run asks for. UserError where a package is missing; one that cannot begin is told of."""
    makers: dict[str, Callable[[Run, Path], Tracker]] = {"wandb": WandbTracker, "tensorboard": TensorboardTracker}
    made: list[Tracker] = []
    for name in run.logging.trackers:
        try:
            made.append(Guarded(name, makers[name](run, folder)))
        except UserError:
            raise
        except Exception as error:
            warn(f"{name} gets no metrics, because it could not begin: {type(error).__name__}: {error}")
    return made


def close_trackers(trackers: Iterable[Tracker], plots: Iterable[Path]) -> None:
    """Hand over those pictures that are there, and let every tracker end."""
    drawn = [plot for plot in plots if plot.exists()]
    for tracker in trackers:
        tracker.close(drawn)


def warn(text: str) -> None:
    """Tell people what a run goes on without."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Guarded:
    """A tracker whose first error is told, and the last thing that is heard of it: metrics.jsonl has everything."""

    def __init__(self, name: str, tracker: Tracker):
        self.name = name
        self.tracker: Tracker | None = tracker

    def write(self, step: int, values: Mapping[str, float], loads: Mapping[str, Sequence[int]]) -> None:
        """See `Tracker`."""
        if self.tracker is not None:
            self._try(lambda tracker: tracker.write(step, values, loads), f"step {step}")

    def go_back(self, step: int) -> None:
        """See `Tracker`."""
        self._try(lambda tracker: tracker.go_back(step), f"the return to step {step}")

    def close(self, plots: Sequence[Path]) -> None:
        """See `Tracker`."""
        self._try(lambda tracker: tracker.close(plots), "its end")

    def _try(self, action: Callable[[Tracker], None], where: str) -> None:
        if self.tracker is None:
            return
        try:
            action(self.tracker)
        except Exception as error:  # of many kinds: the network, the disk, the service's process
            self.tracker = None
            warn(f"{self.name} gets no more metrics, because of an error at {where}: {type(error).__name__}: {error}")


class WandbTracker:
    """Weights & Biases; offline unless WANDB_MODE says otherwise, so that it never asks for a login.

    Where the server cannot be reached in time, the metrics are kept offline under the same id, for `wandb sync`.
    """

    def __init__(self, run: Run, folder: Path):
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DISABLE_GIT", "true")  # its patch has no credentials masked; ours is in git.diff
        os.environ.setdefault("WANDB_INIT_TIMEOUT", str(INIT_SECONDS))
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))  # also of the exit hook of the package
        import wandb  # takes seconds, and most runs do without

        self.wandb, id_file = wandb, folder / "wandb_id"
        settings = {
            "project": run.logging.project,
            "name": run.name,
            "id": id_file.read_text() if id_file.exists() else None,
            "resume": "allow",
            "dir": str(folder),
            "config": run.to_dict(),
        }
        self.run = self._begin(settings)
        self.last_step = 0
        write_atomic(id_file, self.run.id)

    def _begin(self, settings: dict[str, Any]) -> Any:
        try:
            return self.wandb.init(**settings)
        except Exception as error:  # no server, no login, no such project
            if os.environ["WANDB_MODE"] == "offline":
                raise
            warn(f"W&B keeps the metrics offline, for `wandb sync`: {type(error).__name__}: {error}")
            return self.wandb.init(**settings, mode="offline")

    def write(self, step: int, values: Mapping[str, float], loads: Mapping[str, Sequence[int]]) -> None:
        """See `Tracker`."""
        self.last_step = step
        self.run.log({**values, **{name: self.wandb.Histogram(load) for name, load in loads.items()}}, step=step)

    def go_back(self, step: int) -> None:
        """See `Tracker`. W&B takes no step twice: it keeps what it has, and goes on with the first step that is new."""

    def close(self, plots: Sequence[Path]) -> None:
        """See `Tracker`. Older versions of the package know no limit; this process goes on without them."""
        self.run.log({plot.stem: self.wandb.Image(str(plot)) for plot in plots}, step=self.last_step)
        ending = threading.Thread(target=self.run.finish, daemon=True)
        ending.start()
        limit_seconds = float(os.environ["WANDB_FINISH_TIMEOUT"]) + GRACE_SECONDS
        ending.join(limit_seconds)
        if ending.is_alive():
            warn(
                f"W&B has not come to its end in {limit_seconds:.0f} s; `wandb sync` sends what lies in the run folder"
            )


class TensorboardTracker:
    """TensorBoard event files in the run folder."""

    def __init__(self, run: Run, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "the tracker 'tensorboard' needs its package: pip install 'mosaic-dist[tensorboard]'"
            ) from None
        self.folder, self.make_writer = str(folder / "tensorboard"), SummaryWriter
        self.writer = SummaryWriter(self.folder)
        self.last_step = 0

    def write(self, step: int, values: Mapping[str, float], loads: Mapping[str, Sequence[int]]) -> None:
        """See `Tracker`."""
        self.last_step = step
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        for name, load in loads.items():
            self.writer.add_histogram(name, numpy.array(load), step)

    def go_back(self, step: int) -> None:
        """See `Tracker`. A new file tells TensorBoard to hide what was written of these steps."""
        self.writer.close()
        self.writer = self.make_writer(self.folder, purge_step=step + 1)

    def close(self, plots: Sequence[Path]) -> None:
        """See `Tracker`."""
        from mosaic_dist.figure import pyplot  # here, because matplotlib takes a third of a second

        for plot in plots:
            picture = pyplot.imread(plot)[:, :, :3]  # without the opacity; values from 0 to 1
            self.writer.add_image(plot.stem, picture, self.last_step, dataformats="HWC")
        self.writer.close()
