"""Learned absolute positions, added to the embeddings (GPT-2)."""

import torch
from torch import Tensor, nn

from mosaic_dist.model.linear import embed
from mosaic_dist.model.position.position import Position, PositionModule


class Learned(Position, type="learned"):
    """A learned vector per position, up to the model's context length."""

    def build(self, dim: int, max_seq_len: int) -> PositionModule:
        """weight [max_seq_len, dim]."""
        return LearnedPosition(dim, max_seq_len)


class LearnedPosition(PositionModule):
    """Adds a learned vector per position: weight [max_seq_len, dim]."""

    is_table = True

    def __init__(self, dim: int, max_seq_len: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_seq_len, dim))

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Add weight[p] to the token at position p."""
        return x_BTD + embed(self.weight, positions_BT)
