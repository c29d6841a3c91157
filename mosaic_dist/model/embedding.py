"""Token embeddings: a table as wide as the model, or a narrow one projected up."""

import torch
from torch import Tensor, nn

from mosaic_dist.model.linear import Linear, embed
from mosaic_dist.spec import Positive, PositiveFloat, Spec


class Embedding(Spec):
    """Family of token embeddings.

    `multiplier` scales what the model sees of a token (sqrt(dim) in Vaswani et al., arXiv 1706.03762, section 3.4, and
    in Gemma). A table that is also the output's starts small; unscaled, it is drowned by what the blocks write.
    """

    multiplier: PositiveFloat = 1.0

    def build(self, vocab_size: int, dim: int) -> "EmbeddingModule":
        """Module mapping tokens [B, T] int64 to [B, T, dim], with its table as `weight`."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of embedding")


class Table(Embedding, type="table"):
    """One row of width `dim` per token."""

    def build(self, vocab_size: int, dim: int) -> "EmbeddingModule":
        """weight [vocab_size, dim]."""
        return EmbeddingModule(vocab_size, dim, dim, self.multiplier)


class Factored(Embedding, type="factored"):
    """A table of width `rank`, projected up to the model's width (ALBERT, arXiv 1909.11942)."""

    rank: Positive

    def build(self, vocab_size: int, dim: int) -> "EmbeddingModule":
        """weight [vocab_size, rank], up [dim, rank]."""
        return EmbeddingModule(vocab_size, self.rank, dim, self.multiplier)


class EmbeddingModule(nn.Module):
    """Look-up in weight [vocab_size, width], then a projection where `width` is not the model's."""

    is_table = True

    def __init__(self, vocab_size: int, width: int, dim: int, multiplier: float):
        super().__init__()
        self.multiplier = multiplier
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.up = None if width == dim else Linear(width, dim, keeps_scale=True)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """tokens_BT int64 -> x_BTD."""
        x_BTC = embed(self.weight, tokens_BT)
        x_BTD = x_BTC if self.up is None else self.up(x_BTC)
        return x_BTD if self.multiplier == 1.0 else x_BTD * self.multiplier
