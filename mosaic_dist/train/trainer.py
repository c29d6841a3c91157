"""The training loop."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mosaic_dist.data.stream import Loader, ValidationBatches
from mosaic_dist.errors import UserError
from mosaic_dist.parallel import Engine, StepResult
from mosaic_dist.run_spec import Run


@dataclass
class Progress:
    """Where a run is. With the weights, the optimizer, the generators and the data's cursor this is all its state."""

    step: int = 0
    """Updates done, skipped ones included."""
    tokens: int = 0
    """Scored tokens seen."""


class Trainer:
    """A run under way: its engine, its data, and where it is."""

    def __init__(self, run: Run, engine: Engine, loader: Loader, progress: Progress):
        self.run, self.engine, self.loader, self.progress = run, engine, loader, progress
        self.learning_rate = 0.0
        self.step_seconds = 0.0
        self.data_seconds = 0.0

    def train(self, until_step: int, hooks: Sequence["Hook"]) -> None:
        """Take steps until `until_step` are done; after each, every hook has its turn, in order."""
        batches = iter(self.loader)
        while self.progress.step < until_step:
            started = time.perf_counter()
            batch = next(batches)
            self.data_seconds = time.perf_counter() - started
            self.learning_rate = self.run.optimizer.learning_rate * self.run.schedule.factor(
                self.progress.step, self.run.steps
            )
            result = self.engine.train_step(batch.inputs_BT, batch.targets_BT, self.learning_rate)
            self.progress.step += 1
            self.progress.tokens += result.tokens
            self.step_seconds = time.perf_counter() - started
            for hook in hooks:
                hook.after_step(self, result)


class Hook(Protocol):
    """Something that happens after a step. Every rank calls every hook."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Look at the step that was just done."""


def due(step: int, every_steps: int, last_step: int) -> bool:
    """Whether something done every so many steps, and at the last one, is due after `step`. 0 means never."""
    return every_steps > 0 and (step % every_steps == 0 or step == last_step)


MAX_SKIPS_IN_A_ROW = 20


class NonfiniteGuard:
    """Stops a run, or lets it go on, when the loss is NaN or infinite.

    The engine has already left the weights alone. A skip without a bad loss is the fp16 loss scale finding its level.
    """

    def __init__(self, policy: str):
        self.policy = policy
        self.in_a_row = 0

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Raise UserError with a diagnosis where the policy says stop, or skips do not end."""
        finite = math.isfinite(result.loss) and math.isfinite(result.auxiliary_loss)
        full_precision = not trainer.engine.loss_is_scaled
        bad = not finite or (result.skipped and full_precision)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if bad and (self.policy == "stop" or self.in_a_row >= MAX_SKIPS_IN_A_ROW):
            what = f"loss {result.loss}, auxiliary loss {result.auxiliary_loss}, gradient norm {result.grad_norm}"
            raise UserError(
                f"step {trainer.progress.step}: {what}: not finite"
                f"{f', {self.in_a_row} times in a row' if self.in_a_row > 1 else ''}. The weights were left as they "
                f"were before the step (learning rate {trainer.learning_rate:.3g}, the batch ends at sample "
                f"{trainer.loader.cursor}). Lower optimizer.learning_rate, raise schedule.warmup_steps, use another "
                "--precision, or set --nonfinite skip; the last checkpoint is good"
            )


class Validation:
    """Measures the loss on held-out data every so many steps, and at the end."""

    def __init__(self, batches: ValidationBatches | None, every_steps: int):
        self.batches, self.every_steps = batches, every_steps
        self.loss: float | None = None
        """Of the step that was just done; None where it was not measured."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate when due."""
        self.loss = None
        if self.batches is not None and due(trainer.progress.step, self.every_steps, trainer.run.steps):
            self.loss = trainer.engine.evaluate((batch.inputs_BT, batch.targets_BT) for batch in self.batches)
