"""Hooks that tell how a run goes: metrics, progress, plots. They act on the main process only."""

import sys
import time
from typing import Any

from tqdm import tqdm

from mosaic_dist.parallel import StepResult
from mosaic_dist.run_spec import Run
from mosaic_dist.train.experts import Experts, describe_experts, flatten, loads_by_layer, max_over_mean
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.memory import peak_memory_bytes
from mosaic_dist.train.metrics import MetricsFile, each_record
from mosaic_dist.train.trackers import Tracker
from mosaic_dist.train.trainer import Trainer

PLAIN_LINE_SECONDS = 10.0
"""Interval of progress lines where stderr is no terminal."""


class Metrics:
    """Writes `metrics.jsonl` and feeds the trackers."""

    def __init__(self, folder: RunFolder, step: int, trackers: list[Tracker], speed: "Speed"):
        self.file = MetricsFile(folder.metrics, step)
        self.trackers, self.speed = trackers, speed

    def post_step(self, trainer: Trainer, result: StepResult) -> None:
        """Record the step when due, and always when it was validated, was a spike, or is the first after a rewind."""
        rewinds = [rewind for rewind in trainer.progress.rewinds if rewind["back_to_step"] == trainer.progress.step - 1]
        is_notable = trainer.validation_loss is not None or result.rejected or rewinds
        if not is_notable and not trainer.is_due(trainer.run.logging.every_steps):
            return
        values = self._values(trainer, result)
        experts = self._experts(trainer, result)
        self.file.write(values | ({"rewinds": rewinds} if rewinds else {}) | ({"experts": experts} if experts else {}))
        of_experts, loads = flatten(experts)
        step = values.pop("step")
        for tracker in self.trackers:
            tracker.write(step, values | of_experts, loads)

    def go_back(self, trainer: Trainer) -> None:
        """Drop the records of the steps that are done anew; the trackers, which cannot, get the spike as it was."""
        step, rewind = trainer.progress.step, trainer.progress.rewinds[-1]
        self.file.go_back(step)
        for tracker in self.trackers:
            tracker.go_back(step)
            tracker.write(int(rewind["step"]), {f"spike_{name}": rewind[name] for name in ("loss", "threshold")}, {})

    def _values(self, trainer: Trainer, result: StepResult) -> dict[str, Any]:
        """The numbers of every record."""
        values: dict[str, Any] = {
            "step": trainer.progress.step,
            "tokens": trainer.progress.tokens,
            "loss": result.loss,
            "auxiliary_loss": result.auxiliary_loss,
            "learning_rate": trainer.learning_rate,
            "grad_norm": result.grad_norm,
            "skipped": result.skipped,
            "step_seconds": trainer.step_seconds,
            "data_seconds": trainer.data_seconds,
            "data_share": trainer.data_seconds / trainer.step_seconds,
            "tokens_per_second": result.tokens / trainer.step_seconds,
            "mfu": self.speed.mfu(result.tokens, trainer.step_seconds),
            "memory_bytes": peak_memory_bytes(),
        }
        if trainer.run.model.loss.z_loss_coef:
            values["z_loss"] = result.z_loss
        if result.rejected:
            values["spike_threshold"] = trainer.loss_threshold
        epochs = trainer.loader.epochs
        values |= {f"epoch/{name}" if name else "epoch": epoch for name, epoch in epochs.items()}
        if loads := loads_by_layer(trainer.run.model, result.expert_load):
            values["expert_max_over_mean"] = max(max_over_mean(load_E) for load_E in loads.values())
        if trainer.validation_loss is not None:
            values["validation_loss"] = trainer.validation_loss
            values |= {f"validation_loss/{name}": loss for name, loss in trainer.validation_losses.items()}
        if trainer.validation_exact_match is not None:
            values["validation_exact_match"] = trainer.validation_exact_match
        told, trainer.save_told = trainer.save_told, {}
        return values | told

    def _experts(self, trainer: Trainer, result: StepResult) -> Experts:
        """The figures of each layer with experts, where this record is the first one since they became due; or none."""
        every = trainer.run.logging.experts_every_steps
        due = every > 0 and (trainer.progress.step // every > self.file.last_step // every or trainer.is_ending)
        return describe_experts(trainer.run.model, result, trainer.engine) if due else {}


class Speed:
    """Turns tokens and seconds into model-FLOPs utilisation."""

    def __init__(self, flops_per_token: float, peak_flops_per_second: float):
        self.flops_per_token, self.peak = flops_per_token, peak_flops_per_second

    def mfu(self, tokens: int, seconds: float) -> float:
        """Share of the peak that the model's own arithmetic used."""
        return tokens * self.flops_per_token / seconds / self.peak


class FirstStep:
    """Tells how long the first step of this start took, in which blocks were compiled."""

    def __init__(self) -> None:
        self.is_told = False

    def post_step(self, trainer: Trainer, result: StepResult) -> None:
        """Tell, once."""
        if not self.is_told:
            self.is_told = True
            tqdm.write(f"blocks are compiled: the first step took {trainer.step_seconds:.0f} s", file=sys.stderr)


class ProgressBar:
    """A bar with the step's figures, the last exact match and ETA; plain lines where stderr is no terminal."""

    def __init__(self, run: Run, step: int, until_step: int, speed: Speed):
        self.speed, self.until_step = speed, until_step
        self.bar = tqdm(total=until_step, initial=step, unit="step", desc=run.name, disable=not sys.stderr.isatty())
        self.first_step, self.started, self.last_line = step, time.monotonic(), 0.0
        self.exact_match: float | None = None
        """The last that was measured: most lines fall between two validations."""
        self.step_seconds = self.data_seconds = 0.0
        """Of all steps but the first of this start, which also starts the readers."""

    def post_step(self, trainer: Trainer, result: StepResult) -> None:
        """Advance."""
        if trainer.progress.step > self.first_step + 1:
            self.step_seconds += trainer.step_seconds
            self.data_seconds += trainer.data_seconds
        words = {
            "loss": f"{result.loss:.4f}",
            "lr": f"{trainer.learning_rate:.2e}",
            "norm": f"{result.grad_norm:.2f}",
            "tokens/s": f"{result.tokens / trainer.step_seconds:,.0f}",
            "mfu": f"{self.speed.mfu(result.tokens, trainer.step_seconds):.1%}",
            "waiting for data": f"{self.data_seconds / max(self.step_seconds, 1e-9):.1%}",
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
            first, now, end = map(trainer.run.tokens_after, (self.first_step, step, self.until_step))
            left = (self.last_line - self.started) / (now - first) * (end - now)
            text = "  ".join(f"{key} {value}" for key, value in words.items())
            print(f"step {step}/{self.until_step}  {text}  eta {left:.0f} s", file=sys.stderr, flush=True)

    def go_back(self, trainer: Trainer) -> None:
        """Count from an earlier step on."""
        self.first_step, self.started = trainer.progress.step, time.monotonic()
        self.bar.reset()
        self.bar.initial = self.bar.n = trainer.progress.step
        if trainer.is_ending:
            self.bar.close()


class Plots:
    """Draws the loss curve and what the experts do, every so many steps and when this start of the run ends."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def post_step(self, trainer: Trainer, result: StepResult) -> None:
        """Draw when due, from the whole of `metrics.jsonl`: also what earlier starts of the run did."""
        if not (trainer.is_ending or trainer.is_due(trainer.run.logging.plot_every_steps)):
            return
        # here, because matplotlib takes a third of a second, and only the main process draws, mostly at the end
        from mosaic_dist.train.expert_plot import plot_experts, split_experts
        from mosaic_dist.train.plot import plot_loss

        records, history = split_experts(each_record(self.folder.metrics))
        plot_loss(records, self.folder.loss_plot, trainer.run.name)
        if history.steps:
            plot_experts(history, self.folder.experts_plot, trainer.run.name)
