"""Optimizers, parameter groups, schedules."""

from mosaic_dist.optim.adamw import AdamW, Optimizer
from mosaic_dist.optim.batch_ramp import BatchRamp
from mosaic_dist.optim.groups import parameter_groups
from mosaic_dist.optim.muon import Muon
from mosaic_dist.optim.schedule import WSD, Constant, Cosine, Exponential, InverseSquareRoot, LinearSchedule, Schedule
from mosaic_dist.optim.spikes import Spikes

__all__ = [
    "WSD",
    "AdamW",
    "BatchRamp",
    "Constant",
    "Cosine",
    "Exponential",
    "InverseSquareRoot",
    "LinearSchedule",
    "Muon",
    "Optimizer",
    "Schedule",
    "Spikes",
    "parameter_groups",
]
