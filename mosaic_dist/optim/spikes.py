"""Which loss is a spike: a pure function of the losses before it, so that all ranks and every resumed run agree."""

import math
import statistics
from collections.abc import Sequence
from typing import Annotated, Literal

from mosaic_dist.spec import Positive, PositiveFloat, Range, Spec

MAD_TO_DEVIATION = 1.4826
"""Standard deviations in one median absolute deviation, of normally distributed values."""


class Spikes(Spec):
    """What is done about a step whose loss jumps.

    A loss (of the global batch) is a spike where it exceeds the median of the last `window_steps` losses that were
    learnt from by more than `deviations` standard deviations. These are estimated by the median absolute deviation,
    which a few high losses cannot stretch. Nothing is judged before so many steps, and a loss that is not finite never:
    that is what `on_nonfinite_loss` of the run is for.

    "skip" leaves the update out. "rewind" goes back to the newest checkpoint besides, and on with the data that follow
    the spike, as PaLM did (arXiv 2204.02311, section 5.1); before the first checkpoint it skips. After `limit` spikes
    in a row the run ends: steps for "skip", for "rewind" returns to one checkpoint.
    """

    action: Literal["none", "skip", "rewind"] = "none"
    deviations: PositiveFloat = 6.0
    window_steps: Annotated[int, Range(4)] = 128
    limit: Positive = 10

    def threshold(self, losses: Sequence[float]) -> float:
        """The highest loss to learn from, after those that were learnt from; infinite where nothing is judged."""
        recent = losses[-self.window_steps :]
        if self.action == "none" or len(recent) < self.window_steps:
            return math.inf
        middle = statistics.median(recent)
        deviation = MAD_TO_DEVIATION * statistics.median(abs(loss - middle) for loss in recent)
        return middle + self.deviations * deviation if deviation else math.inf  # equal losses tell no scale

    def remember(self, losses: Sequence[float], loss: float) -> list[float]:
        """What has to be known of the losses for the next threshold, after one more that was learnt from."""
        return [] if self.action == "none" else [*losses, loss][-self.window_steps :]
