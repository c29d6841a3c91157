"""Hooks that tell how a run goes: metrics, progress, trackers, plot. They act on the main process only."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from mosaic_dist.errors import UserError
from mosaic_dist.parallel import StepResult
from mosaic_dist.run_spec import Run
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.metrics import MetricsFile, read_metrics
from mosaic_dist.train.plot import plot_loss
from mosaic_dist.train.trainer import Trainer

PLAIN_LINE_SECONDS = 10.0
"""Interval of progress lines where stderr is no terminal."""


class Tracker(Protocol):
    """A service that takes metrics: W&B, TensorBoard."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record numbers of a step."""


class Metrics:
    """Writes `metrics.jsonl` and feeds the trackers."""

    def __init__(self, folder: RunFolder, step: int, trackers: list[Tracker], speed: "Speed"):
        self.file = MetricsFile(folder.metrics, step)
        self.trackers, self.speed = trackers, speed

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Record the step when due, and always when it was validated."""
        step = trainer.progress.step
        if trainer.validation_loss is None and not trainer.is_due(trainer.run.logging.every_steps):
            return
        record: dict[str, Any] = {
            "step": step,
            "tokens": trainer.progress.tokens,
            "loss": result.loss,
            "auxiliary_loss": result.auxiliary_loss,
            "learning_rate": trainer.learning_rate,
            "grad_norm": result.grad_norm,
            "skipped": result.skipped,
            "step_seconds": trainer.step_seconds,
            "data_seconds": trainer.data_seconds,
            "tokens_per_second": result.tokens / trainer.step_seconds,
            "mfu": self.speed.mfu(result.tokens, trainer.step_seconds),
        }
        if result.expert_load.numel():
            load_LE = result.expert_load.double()
            record["expert_max_over_mean"] = (load_LE.amax(1) / load_LE.mean(1)).max().item()
        if trainer.validation_loss is not None:
            record["validation_loss"] = trainer.validation_loss
        if trainer.validation_exact_match is not None:
            record["validation_exact_match"] = trainer.validation_exact_match
        self.file.write(record)
        for tracker in self.trackers:
            tracker.write(step, {key: value for key, value in record.items() if key != "step"})


class Speed:
    """Turns tokens and seconds into model-FLOPs utilisation."""

    def __init__(self, flops_per_token: float, peak_flops_per_second: float):
        self.flops_per_token, self.peak = flops_per_token, peak_flops_per_second

    def mfu(self, tokens: int, seconds: float) -> float:
        """Share of the peak that the model's own arithmetic used."""
        return tokens * self.flops_per_token / seconds / self.peak


class ProgressBar:
    """A bar with the step's figures, the last exact match and ETA; plain lines where stderr is no terminal."""

    def __init__(self, run: Run, step: int, until_step: int, speed: Speed):
        self.speed, self.until_step = speed, until_step
        self.bar = tqdm(total=until_step, initial=step, unit="step", desc=run.name, disable=not sys.stderr.isatty())
        self.first_step, self.started, self.last_line = step, time.monotonic(), 0.0
        self.exact_match: float | None = None
        """The last that was measured: most lines fall between two validations."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Advance."""
        words = {
            "loss": f"{result.loss:.4f}",
            "lr": f"{trainer.learning_rate:.2e}",
            "norm": f"{result.grad_norm:.2f}",
            "tokens/s": f"{result.tokens / trainer.step_seconds:,.0f}",
            "mfu": f"{self.speed.mfu(result.tokens, trainer.step_seconds):.1%}",
        }
        if trainer.validation_exact_match is not None:
            self.exact_match = trainer.validation_exact_match
        if self.exact_match is not None:
            words["exact match"] = f"{self.exact_match:.1%}"
        step = trainer.progress.step
        if not self.bar.disable:
            self.bar.set_postfix(words, refresh=False)
            self.bar.update()
            if trainer.is_ending:
                self.bar.close()
        elif time.monotonic() - self.last_line >= PLAIN_LINE_SECONDS or trainer.is_ending:
            self.last_line = time.monotonic()
            left = (self.last_line - self.started) / (step - self.first_step) * (self.until_step - step)
            text = "  ".join(f"{key} {value}" for key, value in words.items())
            print(f"step {step}/{self.until_step}  {text}  eta {left:.0f} s", file=sys.stderr, flush=True)


class LossPlot:
    """Draws the loss curve every so many steps and when this start of the run ends."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Draw when due."""
        if trainer.is_ending or trainer.is_due(trainer.run.logging.plot_every_steps):
            plot_loss(read_metrics(self.folder.metrics), self.folder.loss_plot, trainer.run.name)


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
        id_file.write_text(self.run.id)

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        self.run.log(values, step=step)


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

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
