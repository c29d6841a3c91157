"""Checkpoints as intervals of flat tensors: saved whole or not at all, read back in any other partition."""

from mosaic_dist.checkpoint.folder import candidates, newest, prune, refuse_unknown_formats, steps
from mosaic_dist.checkpoint.foreign import refuse_foreign
from mosaic_dist.checkpoint.reader import Checkpoint
from mosaic_dist.checkpoint.spec import CheckpointPolicy
from mosaic_dist.checkpoint.store import save
from mosaic_dist.checkpoint.tensor_shards import CheckpointError, TensorShard

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointPolicy",
    "TensorShard",
    "candidates",
    "newest",
    "prune",
    "refuse_foreign",
    "refuse_unknown_formats",
    "save",
    "steps",
]
