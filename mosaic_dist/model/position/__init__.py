"""Position encodings, one kind per file."""

from mosaic_dist.model.position.learned import Learned
from mosaic_dist.model.position.position import NoPosition, Position, PositionModule

__all__ = ["Learned", "NoPosition", "Position", "PositionModule"]
