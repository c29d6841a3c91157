"""Token embeddings: a table as wide as the model, or a narrow one projected up."""

import torch
from torch import Tensor, nn

from mosaic_dist.model.linear import Linear, embed
from mosaic_dist.spec import Positive, Spec


class Embedding(Spec):
    """Family of token embeddings."""

    def build(self, vocab: int, dim: int) -> "EmbeddingModule":
        """Module mapping tokens [B, T] int64 to [B, T, dim], with its table as `weight`."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of embedding")


class Table(Embedding, type="table"):
    """One row of width `dim` per token."""

    def build(self, vocab: int, dim: int) -> "EmbeddingModule":
        """weight [vocab, dim]."""
        return EmbeddingModule(vocab, dim, dim)


class Factored(Embedding, type="factored"):
    """A table of width `rank`, projected up to the model's width (ALBERT, arXiv 1909.11942)."""

    rank: Positive

    def build(self, vocab: int, dim: int) -> "EmbeddingModule":
        """weight [vocab, rank], up [dim, rank]."""
        return EmbeddingModule(vocab, self.rank, dim)


class EmbeddingModule(nn.Module):
    """Look-up in weight [vocab, width], then a projection where `width` is not the model's."""

    is_table = True

    def __init__(self, vocab: int, width: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width))
        self.up = None if width == dim else Linear(width, dim, keeps_scale=True)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """tokens_BT int64 -> x_BTD."""
        x_BTC = embed(self.weight, tokens_BT)
        return x_BTC if self.up is None else self.up(x_BTC)
