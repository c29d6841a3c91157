"""Sinusoidal absolute positions, added to the embeddings (Vaswani et al., arXiv 1706.03762, section 3.5)."""

import torch
from torch import Tensor

from mosaic_dist.model.position.position import Position, PositionModule
from mosaic_dist.spec import PositiveFloat


class Sinusoidal(Position, type="sinusoidal"):
    """sin and cos of position / base^(2i / dim), interleaved. Works at any length."""

    theta: PositiveFloat = 10_000.0

    def build(self, dim: int, max_seq_len: int) -> PositionModule:
        """Nothing to learn."""
        return SinusoidalPosition(dim, self.theta)


class SinusoidalPosition(PositionModule):
    """Adds fixed sines and cosines of the position to the embeddings."""

    def __init__(self, dim: int, base: float):
        super().__init__()
        self.dim, self.base = dim, base

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Add the waves of each token's position."""
        powers = torch.arange(0, self.dim, 2, device=x_BTD.device, dtype=torch.float32) / self.dim
        angles = positions_BT[..., None].float() * self.base**-powers
        waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., : self.dim]
        return x_BTD + waves.to(x_BTD.dtype)
