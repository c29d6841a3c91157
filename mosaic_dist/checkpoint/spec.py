"""When checkpoints are written and how many stay."""

from mosaic_dist.spec import NonNegative, Positive, Spec


class CheckpointPolicy(Spec):
    """Save every `every_steps` optimizer steps; keep the newest `keep_last` whole checkpoints and delete older ones.

    With `asynchronous` training waits only until each rank has copied its part of the state to host memory (for the
    weights and Adam's moments 12 bytes for each parameter, over all ranks); the copy is written while it goes on.

    With `keep_best` a checkpoint is also written whenever the validation loss is among the so many lowest, and these
    stay. With `keep_every` those whose step is a multiple of it stay for ever. Neither counts among the last.

    With `keep_last=1` a checkpoint whose data turns out to be damaged has no older one to fall back to.
    """

    every_steps: Positive = 500
    keep_last: Positive = 2
    keep_best: NonNegative = 0
    asynchronous: bool = True
    keep_every: NonNegative = 0
