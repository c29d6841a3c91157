"""When a run is saved, and how long training waits for it."""

import functools
import time
from collections.abc import Collection

from mosaic_dist.checkpoint import CheckpointPolicy, prune
from mosaic_dist.checkpoint.background import BackgroundSave
from mosaic_dist.checkpoint.engine_state import engine_state, save_engine
from mosaic_dist.parallel import StepResult
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.interruption import Deadline
from mosaic_dist.train.telling import say
from mosaic_dist.train.trainer import Trainer

NOTABLE_SECONDS = 0.5
"""Of waiting for the save before, which people are told of."""
LAST_CHANCE_SECONDS = 15.0
"""For a save that is under way when the run fails."""


class Saver:
    """Writes a checkpoint every so many steps, when this start of the run ends, and for one of the best losses.

    An error of a save in the background ends the run, on all ranks, with the step in which it happened.
    """

    def __init__(self, folder: RunFolder, deadline: Deadline, trainer: Trainer):
        self.folder, self.deadline, self.world, self.trainer = folder, deadline, trainer.engine.world, trainer
        self.background: BackgroundSave | None = None
        self.has_told_of_waiting = False
        if trainer.run.checkpoint.asynchronous:
            background = self.background = BackgroundSave(trainer.run.parallel.timeout_seconds)
            trainer.engine.before_update = background.wait_for_copy
            trainer.reasons_to_stop["a checkpoint that failed"] = lambda: background.has_failed

    def post_step(self, trainer: Trainer, result: StepResult) -> None:
        """Save when due, then drop the oldest. Every rank takes part."""
        policy, progress = trainer.run.checkpoint, trainer.progress
        best = {int(step) for _, step in progress.best} if policy.keep_best else set()
        is_best = trainer.validation_loss is not None and progress.step in best
        if not (trainer.is_due(policy.every_steps) or is_best):
            return
        state = {"progress": vars(progress), "data": trainer.loader.state()}
        finish = functools.partial(self._finish, progress.step, policy, best)
        if self.background is None:
            started = time.monotonic()
            save_engine(self.folder.checkpoints, progress.step, trainer.engine, state)
            finish(started, time.monotonic() - started)
            return
        self._tell_of_waiting(progress.step, self.background.wait())
        finish = functools.partial(finish, time.monotonic())
        self.background.start(self.folder.checkpoints, progress.step, engine_state(trainer.engine, state), finish)
        if trainer.is_ending:
            self.background.wait()

    def wait(self) -> None:
        """Wait until nothing is being saved. Raises what a save in the background raised."""
        if self.background is not None:
            self.background.wait()

    def close(self) -> None:
        """Give a save that is under way when the run fails the time to come to its end."""
        if self.background is not None:
            self.background.join(LAST_CHANCE_SECONDS)

    def _finish(
        self, step: int, policy: CheckpointPolicy, best: Collection[int], started: float, stall_seconds: float
    ) -> None:
        """What follows when a checkpoint is there; in the thread of the save, if it has one."""
        seconds = time.monotonic() - started
        self.deadline.add_save(seconds)
        self.trainer.save_told = {"save_seconds": seconds, "save_stall_seconds": stall_seconds}
        if self.world.is_main:
            prune(self.folder.checkpoints, policy.keep_last, best, policy.keep_every)
        say(self.world, f"step {step}: saved in {seconds:.2f} s; training waited {stall_seconds:.2f} s")

    def _tell_of_waiting(self, step: int, seconds: float) -> None:
        """Say once that saves take longer than what lies between them."""
        if seconds > NOTABLE_SECONDS and not self.has_told_of_waiting:
            self.has_told_of_waiting = True
            say(
                self.world,
                f"step {step}: training waited {seconds:.1f} s for the last checkpoint to be written (told once); "
                "raise checkpoint.every_steps",
            )
