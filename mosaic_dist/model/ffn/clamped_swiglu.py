"""Clamped SwiGLU feed-forward network, of the released gpt-oss (OpenAI, arXiv 2508.10925)."""

import torch
from torch import Tensor, nn

from mosaic_dist.model.ffn.ffn import DenseFFN, LinearFactory
from mosaic_dist.spec import PositiveFloat


class ClampedSwiGLU(DenseFFN, type="clamped_swiglu"):
    """down(g * sigmoid(alpha * g) * (u + 1)) with g = min(gate(x), limit) and u = up(x) held to [-limit, limit].

    The defaults are gpt-oss's, whose layers have biases as well (`bias=True`). Beyond the limits gradients are zero.
    """

    limit: PositiveFloat = 7.0
    alpha: PositiveFloat = 1.702

    def build_with(self, dim: int, width: int, linear: LinearFactory) -> nn.Module:
        """gate, up [dim -> width], down [width -> dim]."""
        return ClampedSwiGLUNetwork(dim, width, linear, self.limit, self.alpha)


class ClampedSwiGLUNetwork(nn.Module):
    """See `ClampedSwiGLU`. Gate and up are two layers; gpt-oss's files interleave their columns in one matrix."""

    def __init__(self, dim: int, width: int, linear: LinearFactory, limit: float, alpha: float):
        super().__init__()
        self.limit, self.alpha = limit, alpha
        self.gate, self.up = linear(dim, width), linear(dim, width)
        self.down = linear(width, dim, residual=True)

    def forward(self, x: Tensor, *groups: object) -> Tensor:
        """[..., D] -> [..., D]; `groups` go to every layer."""
        gate = self.gate(x, *groups).clamp(max=self.limit)
        up = self.up(x, *groups).clamp(-self.limit, self.limit)
        return self.down(gate * torch.sigmoid(self.alpha * gate) * (up + 1), *groups)
