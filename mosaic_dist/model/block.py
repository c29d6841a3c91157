"""Transformer blocks: how attention and feed-forward network join the residual stream. nGPT's is in `ngpt.py`."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.model.attention import Attention, AttentionMetadata, AttentionModule
from mosaic_dist.model.ffn import FFN, AuxOutputs
from mosaic_dist.model.norm import Norm, epsilon
from mosaic_dist.model.position import Position
from mosaic_dist.spec import Spec, UnitInterval, at


class BlockKind(Spec):
    """Family of blocks. `dropout` acts on what attention and feed-forward network give."""

    attention: Attention
    ffn: FFN
    dropout: UnitInterval = 0.0

    def build(self, dim: int, norm: Norm, position: Position) -> "BlockModule":
        """The block's module. `norm` is the model's. A part that does not fit the width is refused with its path."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of block")

    def build_parts(self, dim: int, norm: Norm, position: Position) -> tuple[AttentionModule, nn.Module]:
        """Attention and feed-forward network, which every kind has."""
        with at("attention"):
            attention = self.attention.build(dim, position, epsilon(norm))
        with at("ffn"):
            ffn = self.ffn.build(dim)
        return attention, ffn


class BlockModule(nn.Module):
    """Base of block modules. The norms are what the kind does before or after its two parts."""

    def __init__(
        self, attention: AttentionModule, ffn: nn.Module, attention_norm: nn.Module, ffn_norm: nn.Module, dropout: float
    ):
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.ffn = ffn_norm, ffn
        self.dropout = dropout

    def forward(self, x_BTD: Tensor, metadata: AttentionMetadata, cache: Any = None) -> tuple[Tensor, AuxOutputs]:
        """x_BTD -> ([B, T, D], what the feed-forward network tells)."""
        x_BTD, seen_BTD = self.before_ffn(x_BTD, metadata, cache)
        out_BTD, extras = self.ffn(seen_BTD)
        return self.after_ffn(x_BTD, out_BTD), extras

    def before_ffn(self, x_BTD: Tensor, metadata: AttentionMetadata, cache: Any) -> tuple[Tensor, Tensor]:
        """x_BTD -> (the residual stream with the attention in it, what the feed-forward network sees)."""
        raise TypeError(f"{type(self).__name__} has no attention: a kind of block says how")

    def after_ffn(self, x_BTD: Tensor, out_BTD: Tensor) -> Tensor:
        """The residual stream and what the feed-forward network gives -> [B, T, D]."""
        raise TypeError(f"{type(self).__name__} does not go on: a kind of block says how")

    def new_cache(self, batch: int, capacity: int) -> Any:
        """The attention's."""
        return self.attention.new_cache(batch, capacity)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout, while training."""
        return functional.dropout(x, self.dropout, training=self.training) if self.dropout else x


class Block(BlockKind, type="prenorm"):
    """x + attention(norm(x)), then x + ffn(norm(x)) (pre-norm; Xiong et al., arXiv 2002.04745)."""

    def build(self, dim: int, norm: Norm, position: Position) -> "PreNormBlock":
        """Build attention, feed-forward network and two norms."""
        attention, ffn = self.build_parts(dim, norm, position)
        return PreNormBlock(attention, ffn, norm.build(dim), norm.build(dim), self.dropout)


class PreNormBlock(BlockModule):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def before_ffn(self, x_BTD: Tensor, metadata: AttentionMetadata, cache: Any) -> tuple[Tensor, Tensor]:
        """Attention with its residual; returns the hidden state and the input of the feed-forward network."""
        x_BTD = x_BTD + self.drop(self.attention(self.attention_norm(x_BTD), metadata, cache))
        return x_BTD, self.ffn_norm(x_BTD)

    def after_ffn(self, x_BTD: Tensor, out_BTD: Tensor) -> Tensor:
        """Add the feed-forward network's output to the hidden state."""
        return x_BTD + self.drop(out_BTD)
