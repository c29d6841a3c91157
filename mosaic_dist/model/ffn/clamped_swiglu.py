"""Clamped SwiGLU feed-forward network, of the released gpt-oss (OpenAI, arXiv 2508.10925)."""

import torch
from torch import Tensor

from mosaic_dist.model.ffn.ffn import GatedFFN
from mosaic_dist.spec import PositiveFloat


class ClampedSwiGLU(GatedFFN, type="clamped_swiglu"):
    """down(g * sigmoid(alpha * g) * (u + 1)) with g = min(gate(x), limit) and u = up(x) held to [-limit, limit].

    The defaults are gpt-oss's, whose layers have biases as well (`bias=True`). Beyond the limits gradients are zero.
    Gate and up are two layers; gpt-oss's files interleave their columns in one matrix.
    """

    limit: PositiveFloat = 7.0
    alpha: PositiveFloat = 1.702

    def activate(self, *hidden: Tensor) -> Tensor:
        """gate, up -> what down sees."""
        gate = hidden[0].clamp(max=self.limit)
        up = hidden[1].clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)
