"""What a run does after a spike of its loss, of which it has not learnt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.errors import UserError
from mosaic_dist.parallel import StepResult
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.resuming import newest_good, restore_run
from mosaic_dist.train.saving import Saver
from mosaic_dist.train.telling import say
from mosaic_dist.train.trainer import Progress, Trainer


class FollowsSteps(Protocol):
    """Something that has to know when the run goes back."""

    def go_back(self, trainer: Trainer) -> None:
        """The run is at an earlier step now; the last of its `rewinds` says why."""


class SpikeGuard:
    """Tells of every spike, goes back to a checkpoint where the run says so, and ends a run that has too many.

    The loader stays where it is, so the data between the checkpoint and the end of the spike's batch are passed over.
    A start after a crash that finds the checkpoint still the newest comes to the same spike, and goes back again.
    """

    def __init__(self, folder: RunFolder, saver: Saver, trainer: Trainer, followers: Sequence[FollowsSteps]):
        self.folder, self.saver, self.trainer, self.followers = folder, saver, trainer, followers
        self.spikes, self.world = trainer.run.spikes, trainer.engine.world

    def after_spike(self, result: StepResult) -> bool:
        """Say what is done, and do it; whether the run went back. Every rank calls. UserError at the policy's limit."""
        trainer, progress = self.trainer, self.trainer.progress
        what = (
            f"step {progress.step}: loss {result.loss:.4f} is a spike, above {trainer.loss_threshold:.4f} (the median "
            f"of the last {self.spikes.window_steps} steps and {self.spikes.deviations:g} deviations)"
        )
        checkpoint = self._checkpoint() if self.spikes.action == "rewind" else None
        in_a_row = progress.rejected_in_a_row
        if checkpoint is not None:
            in_a_row = 1 + returns_in_a_row(progress, checkpoint.step)
        if in_a_row >= self.spikes.limit:
            raise UserError(self._too_many(what, in_a_row))
        if checkpoint is not None:
            self._go_back(checkpoint, what, result.loss)
            return True
        why = ", as there is no checkpoint to go back to yet" if self.spikes.action == "rewind" else ""
        say(self.world, f"{what}; its update is left out{why}")
        return False

    def _checkpoint(self) -> Checkpoint | None:
        """The newest, with the one that is being written."""
        step = self.trainer.progress.step
        self.trainer.entered(step, "waiting for a save, to go back")
        self.saver.wait()
        self.trainer.entered(step, "verifying a checkpoint, to go back")
        return newest_good(self.folder, self.world)

    def _go_back(self, checkpoint: Checkpoint, what: str, loss: float) -> None:
        """Bring all but the data to a checkpoint."""
        trainer, progress = self.trainer, self.trainer.progress
        trainer.entered(progress.step, "loading a checkpoint, to go back")
        first, last = checkpoint.state["data"]["cursor"], trainer.loader.cursor
        say(
            self.world,
            f"{what}; back to the checkpoint of step {checkpoint.step}, and on with the data that follow: samples "
            f"{first:,} to {last - 1:,} are passed over",
        )
        rewind = {
            "step": progress.step,
            "loss": loss,
            "threshold": trainer.loss_threshold,
            "back_to_step": checkpoint.step,
        }
        trainer.progress = replace(restore_run(checkpoint, trainer.engine), rewinds=[*progress.rewinds, rewind])
        for follower in self.followers:
            follower.go_back(trainer)

    def _too_many(self, what: str, in_a_row: int) -> str:
        """Why the run ends, and what can be done."""
        times = f" for the {in_a_row}. time in a row" if in_a_row > 1 else ""
        return (
            f"{what}{times}, and spikes.limit is {self.spikes.limit}. The weights are as they were before; the batch "
            f"ends at sample {self.trainer.loader.cursor}. The last checkpoint is good: start again with a higher "
            "--spikes.deviations or --spikes.limit, with --spikes.action skip or none, or begin another run with a "
            "lower optimizer.learning_rate"
        )


def returns_in_a_row(progress: Progress, step: int) -> int:
    """How often, at last, the run went back to the checkpoint of a step and came to no other."""
    count = 0
    for rewind in reversed(progress.rewinds):
        if rewind["back_to_step"] != step:
            break
        count += 1
    return count
