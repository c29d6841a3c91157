"""Learning-rate schedules: pure functions of the step, so that nothing of them needs saving."""

import math
from typing import Literal

from mosaic_dist.spec import NonNegative, Spec, UnitInterval


class Schedule(Spec):
    """Family of schedules: linear warm-up over `warmup_steps`, then what the kind says."""

    warmup_steps: NonNegative = 0

    def factor(self, step: int, steps: int) -> float:
        """Multiplier of the peak learning rate for the update number `step` (from 0) of `steps`."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self.after_warmup(step, steps)

    def after_warmup(self, step: int, steps: int) -> float:
        """The multiplier for the same numbers of a step that is not part of the warm-up."""
        raise TypeError(f"{type(self).__name__} has no curve: choose a kind of schedule")


def share_done(step: int, begin: float, end: int) -> float:
    """How much of the way from step `begin` to step `end` lies behind, from 0 to 1."""
    return min(1.0, max(0.0, (step - begin) / max(1.0, end - begin)))


class Cosine(Schedule, type="cosine"):
    """Half a cosine from 1 down to `min_lr_ratio` (Loshchilov and Hutter, arXiv 1608.03983, without restarts)."""

    min_lr_ratio: UnitInterval = 0.1

    def after_warmup(self, step: int, steps: int) -> float:
        """Factor on the peak learning rate for the 0-based update `step`."""
        done = share_done(step, self.warmup_steps, steps)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


class Constant(Schedule, type="constant"):
    """The peak learning rate throughout."""

    def after_warmup(self, step: int, steps: int) -> float:
        """Always 1."""
        return 1.0


class LinearSchedule(Schedule, type="linear"):
    """A straight line from 1 down to `min_lr_ratio`; to 0 it is what Defazio et al. advise (arXiv 2310.07831)."""

    min_lr_ratio: UnitInterval = 0.0

    def after_warmup(self, step: int, steps: int) -> float:
        """Factor on the peak learning rate for the 0-based update `step`."""
        return 1 - (1 - self.min_lr_ratio) * share_done(step, self.warmup_steps, steps)


class WSD(Schedule, type="wsd"):
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): the peak until the last `decay_fraction` of all steps.

    The steps before the decay do not depend on how many there will be, so one long run can be ended at several lengths
    from its checkpoints. `shape` is a straight line, or 1 - sqrt, which ends lower (Hägele et al., arXiv 2405.18392).
    Where warm-up and decay overlap, the decay begins after the warm-up.
    """

    decay_fraction: UnitInterval = 0.2
    shape: Literal["linear", "1-sqrt"] = "1-sqrt"
    min_lr_ratio: UnitInterval = 0.0

    def after_warmup(self, step: int, steps: int) -> float:
        """Factor on the peak learning rate for the 0-based update `step`."""
        done = share_done(step, max(self.warmup_steps, steps * (1 - self.decay_fraction)), steps)
        gone = done if self.shape == "linear" else math.sqrt(done)
        return 1 - (1 - self.min_lr_ratio) * gone


class Exponential(Schedule, type="exponential"):
    """From `first_fraction` up to 1, by the same factor at each step: the range test of Smith (arXiv 1506.01186)."""

    first_fraction: UnitInterval = 1e-6

    def after_warmup(self, step: int, steps: int) -> float:
        """Factor on the peak learning rate for the 0-based update `step`."""
        return self.first_fraction ** (1 - share_done(step, self.warmup_steps, steps - 1))


class InverseSquareRoot(Schedule, type="inverse_sqrt"):
    """1 / sqrt(update number), scaled to follow the warm-up without a jump (Vaswani et al., arXiv 1706.03762, 5.3).

    It does not depend on the number of steps, so a run can be lengthened at will.
    """

    def after_warmup(self, step: int, steps: int) -> float:
        """Factor on the peak learning rate for the 0-based update `step`."""
        return math.sqrt((self.warmup_steps + 1) / (step + 1))
