"""Transformer blocks: how attention and feed-forward network join the residual stream."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.model.attention import Attention, AttentionModule, Sight
from mosaic_dist.model.ffn import FFN, Extras
from mosaic_dist.model.norm import Norm
from mosaic_dist.model.position import Position
from mosaic_dist.spec import Fraction, Spec, at


class Block(Spec, type="prenorm"):
    """x + attention(norm(x)), then x + ffn(norm(x)) (pre-norm; Xiong et al., arXiv 2002.04745)."""

    attention: Attention
    ffn: FFN
    dropout: Fraction = 0.0

    def build(self, dim: int, norm: Norm, position: Position) -> "PreNormBlock":
        """The block's module. A part that does not fit the width is refused with its path."""
        with at("attention"):
            attention = self.attention.build(dim, position)
        with at("ffn"):
            ffn = self.ffn.build(dim)
        return PreNormBlock(attention, ffn, norm.build(dim), norm.build(dim), self.dropout)


class PreNormBlock(nn.Module):
    """See `Block`."""

    def __init__(
        self, attention: AttentionModule, ffn: nn.Module, attention_norm: nn.Module, ffn_norm: nn.Module, dropout: float
    ):
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.ffn = ffn_norm, ffn
        self.dropout = dropout

    def forward(self, x_BTD: Tensor, sight: Sight, cache: Any = None) -> tuple[Tensor, Extras]:
        """x_BTD -> ([B, T, D], what the feed-forward network tells)."""
        x_BTD = x_BTD + self._drop(self.attention(self.attention_norm(x_BTD), sight, cache))
        out_BTD, extras = self.ffn(self.ffn_norm(x_BTD))
        return x_BTD + self._drop(out_BTD), extras

    def new_cache(self, batch: int, capacity: int) -> Any:
        """The attention's."""
        return self.attention.new_cache(batch, capacity)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, training=self.training) if self.dropout else x
