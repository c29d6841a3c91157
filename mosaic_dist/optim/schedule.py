"""Learning-rate schedules: pure functions of the step, so that nothing of them needs saving."""

import math

from mosaic_dist.spec import Fraction, NonNegative, Spec


class Schedule(Spec):
    """Family of schedules: linear warm-up over `warmup_steps`, then what the kind says."""

    warmup_steps: NonNegative = 0

    def factor(self, step: int, steps: int) -> float:
        """Multiplier of the peak learning rate for the update number `step` (from 0) of `steps`."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.after_warmup(min(1.0, done))

    def after_warmup(self, done: float) -> float:
        """Multiplier when the share `done` of the steps after the warm-up lies behind."""
        raise TypeError(f"{type(self).__name__} has no curve: choose a kind of schedule")


class Cosine(Schedule, type="cosine"):
    """Half a cosine from 1 down to `final_fraction` (Loshchilov and Hutter, arXiv 1608.03983, without restarts)."""

    final_fraction: Fraction = 0.1

    def after_warmup(self, done: float) -> float:
        """See the class."""
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))


class Constant(Schedule, type="constant"):
    """The peak learning rate throughout."""

    def after_warmup(self, done: float) -> float:
        """Always 1."""
        return 1.0
