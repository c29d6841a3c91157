"""The training loop."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from mosaic_dist.data.batch import Batch
from mosaic_dist.data.stream import Loader, ValidationBatches
from mosaic_dist.errors import UserError
from mosaic_dist.memory import gc_frozen
from mosaic_dist.optim import Spikes
from mosaic_dist.parallel import Engine, StepResult
from mosaic_dist.parallel.engine import HeldOut
from mosaic_dist.run_spec import Run


@dataclass
class Progress:
    """Where a run is. With the weights, the optimizer, the generators and the data's cursor this is all its state."""

    step: int = 0
    """Updates done, skipped ones included."""
    tokens: int = 0
    """Scored tokens seen."""
    best: list[list[float]] = field(default_factory=list)
    """[validation loss, step] of the lowest losses, the lowest first."""
    validations_since_best: int = 0
    stopped_early: bool = False
    recent_losses: list[float] = field(default_factory=list)
    """What `run.spikes` judges the next loss by."""
    rejected_in_a_row: int = 0
    rewinds: list[dict[str, float]] = field(default_factory=list)
    """Each return to a checkpoint: `step`, `loss` and `threshold` of the spike, and `back_to_step`. All of the run."""

    def count(self, result: StepResult, spikes: Spikes) -> None:
        """Count a step that was done."""
        self.step += 1
        self.tokens += result.tokens
        self.rejected_in_a_row = self.rejected_in_a_row + 1 if result.rejected else 0
        if not result.skipped:
            self.recent_losses = spikes.remember(self.recent_losses, result.loss)


class Trainer:
    """A run under way: its engine, its data, where it is, and where this start of it ends."""

    def __init__(self, run: Run, engine: Engine, loader: Loader, progress: Progress, until_step: int):
        self.run, self.engine, self.loader = run, engine, loader
        self.progress, self.until_step = progress, until_step
        self.learning_rate = 0.0
        self.loss_threshold = math.inf
        """Above it the loss of the step that was just done is a spike."""
        self.step_seconds = 0.0
        self.data_seconds = 0.0
        self.validation_loss: float | None = None
        self.validation_exact_match: float | None = None
        """Both of the step that was just done; None where they were not measured."""
        self.validation_losses: dict[str, float] = {}
        """Of each stream of a mixture, by name, where the loss was measured."""
        self.reasons_to_stop: dict[str, Callable[[], bool]] = {}
        """Asked on every rank at the end of each step; where any rank says yes, the step is the last one for all."""
        self.interrupted_by: str | None = None
        """The one of these reasons that holds."""
        self.save_told: dict[str, float] = {}
        """What the record of the next step says of a save that was finished since the last: seconds, by name."""
        self.entered: Callable[[int, str], None] = lambda step, part: None
        """Told of each part of a step when it begins."""
        self.has_gone_back: Callable[[StepResult], bool] = lambda result: False
        """Called after a step that was rejected; whether the run is at a checkpoint now."""

    @property
    def is_ending(self) -> bool:
        """Whether no further step will be taken."""
        return self.has_arrived or self.interrupted_by is not None

    @property
    def has_arrived(self) -> bool:
        """Whether this start of the run got to where it was to end."""
        return self.progress.step >= self.until_step or self.progress.stopped_early

    def is_due(self, every_steps: int) -> bool:
        """Whether something done every so many steps, and at the end, is due now. 0 means never."""
        return every_steps > 0 and (self.progress.step % every_steps == 0 or self.is_ending)

    def train(self, hooks: Sequence["Callback"]) -> None:
        """Take steps until the end; after each, every hook has its turn, in order."""
        with contextlib.closing(iter(self.loader)) as batches, gc_frozen():
            while not self.is_ending:
                step, started = self.progress.step + 1, time.perf_counter()
                self.entered(step, "data")
                batch = next(batches)
                self.data_seconds = time.perf_counter() - started
                self.entered(step, "update")
                result = self._step(batch)
                self.step_seconds = time.perf_counter() - started
                if result.rejected and self.has_gone_back(result):
                    continue  # the hooks had their turn when the run was here before
                for hook in hooks:
                    self.entered(step, type(hook).__name__)
                    hook.post_step(self, result)

    def _step(self, batch: Batch) -> StepResult:
        """Update the weights, count, and learn from all ranks whether to go on."""
        step = self.progress.step
        self.learning_rate = self.run.optimizer.learning_rate * self.run.schedule.factor(step, self.run.steps)
        self.loss_threshold = self.run.spikes.threshold(self.progress.recent_losses)
        result = self.engine.train_step(
            batch.inputs_BT,
            batch.targets_BT,
            self.learning_rate,
            batch.documents_BT,
            lambda: [holds() for holds in self.reasons_to_stop.values()],
            self.loss_threshold,
        )
        self.progress.count(result, self.run.spikes)
        told = zip(self.reasons_to_stop, result.votes, strict=True)
        self.interrupted_by = next((reason for reason, holds in told if holds), None)
        return result


class Callback(Protocol):
    """Something that happens after a step. Every rank calls every hook."""

    def post_step(self, trainer: Trainer, result: StepResult) -> None:
        """Look at the step that was just done."""


MAX_SKIPS_IN_A_ROW = 20


class NonfiniteGuard:
    """Stops a run, or lets it go on, when the loss is NaN or infinite.

    The engine has already left the weights alone. A skip without a bad loss is the fp16 loss scale finding its level,
    or a spike.
    """

    def __init__(self, policy: str):
        self.policy = policy
        self.in_a_row = 0

    def post_step(self, trainer: Trainer, result: StepResult) -> None:
        """Raise UserError with a diagnosis where the policy says stop, or skips do not end."""
        finite = math.isfinite(result.loss) and math.isfinite(result.auxiliary_loss)
        full_precision = not trainer.engine.loss_is_scaled
        bad = not finite or (result.skipped and full_precision and not result.rejected)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if bad and (self.policy == "stop" or self.in_a_row >= MAX_SKIPS_IN_A_ROW):
            what = f"loss {result.loss}, auxiliary loss {result.auxiliary_loss}, gradient norm {result.grad_norm}"
            raise UserError(
                f"step {trainer.progress.step}: {what}: not finite"
                f"{f', {self.in_a_row} times in a row' if self.in_a_row > 1 else ''}. The weights were left as they "
                f"were before the step (learning rate {trainer.learning_rate:.3g}, the batch ends at sample "
                f"{trainer.loader.cursor}). Lower optimizer.learning_rate, raise schedule.warmup_steps, use another "
                "--precision, or set --on_nonfinite_loss skip; the last checkpoint is good"
            )


class HeldOutStream(NamedTuple):
    """Held-out rows of one stream. `share` is the part of the training samples that are of this stream."""

    stream: str
    share: float
    batches: ValidationBatches


class Validation:
    """Measures the loss on held-out data every so many steps and at the run's end, and judges by it.

    `questions` are those rows whose answers are compared to the letter besides. What is measured of a mixture is the
    mean over its streams by their shares, so it stands for the mixture, whatever the sizes of the held-out parts.
    """

    def __init__(self, held_out: Sequence[HeldOutStream], questions: Sequence[HeldOutStream] = ()):
        self.held_out, self.questions = held_out, questions

    def post_step(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate when due, keep the list of the best, and stop a run that gains nothing any more."""
        trainer.validation_loss = trainer.validation_exact_match = None
        trainer.validation_losses = {}
        run, progress = trainer.run, trainer.progress
        due = run.validate_every_steps and progress.step % run.validate_every_steps == 0
        if not self.held_out or not (due or progress.step == run.steps):
            return
        began = functools.partial(trainer.entered, progress.step, "Validation")
        losses = measure(self.held_out, trainer.engine.evaluate, began)
        loss = trainer.validation_loss = mean(self.held_out, losses)
        if len(losses) > 1:
            trainer.validation_losses = losses
        if self.questions:
            right = measure(self.questions, trainer.engine.exact_match, began)
            trainer.validation_exact_match = mean(self.questions, right)
        improved = not progress.best or loss < progress.best[0][0]
        progress.validations_since_best = 0 if improved else progress.validations_since_best + 1
        progress.best = sorted([*progress.best, [loss, progress.step]])[: max(1, run.checkpoint.keep_best)]
        patience = run.early_stopping_patience
        progress.stopped_early = 0 < patience <= progress.validations_since_best


def measure(
    held_out: Sequence[HeldOutStream], figure: Callable[[Iterable[HeldOut]], float], began: Callable[[], None]
) -> dict[str, float]:
    """A figure of the engine for each stream, by name; `began` is told of each batch. Every rank must call."""

    def rows(batches: Iterable[Batch]) -> Iterator[HeldOut]:
        for batch in batches:
            began()  # all of them together may take long
            yield batch.inputs_BT, batch.targets_BT, batch.documents_BT

    found = {}
    for stream in held_out:
        with contextlib.closing(iter(stream.batches)) as batches:
            found[stream.stream] = figure(rows(batches))
    return found


def mean(held_out: Sequence[HeldOutStream], figures: Mapping[str, float]) -> float:
    """The mean over the streams by their shares."""
    return sum(stream.share * figures[stream.stream] for stream in held_out)
