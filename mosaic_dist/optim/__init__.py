"""Optimizers, parameter groups, schedules."""

from mosaic_dist.optim.adamw import AdamW, Optimizer
from mosaic_dist.optim.groups import parameter_groups
from mosaic_dist.optim.schedule import Constant, Cosine, Schedule

__all__ = ["AdamW", "Constant", "Cosine", "Optimizer", "Schedule", "parameter_groups"]
