"""Position encodings, one kind per file."""

from mosaic_dist.model.position.alibi import ALiBi
from mosaic_dist.model.position.learned import Learned
from mosaic_dist.model.position.position import HeadPosition, NoPosition, Position, PositionModule
from mosaic_dist.model.position.rope import DecoupledRoPE, LinearScaling, Llama3Scaling, NTKScaling, RoPE, YaRN
from mosaic_dist.model.position.sinusoidal import Sinusoidal

__all__ = [
    "ALiBi",
    "DecoupledRoPE",
    "HeadPosition",
    "Learned",
    "LinearScaling",
    "Llama3Scaling",
    "NTKScaling",
    "NoPosition",
    "Position",
    "PositionModule",
    "RoPE",
    "Sinusoidal",
    "YaRN",
]
