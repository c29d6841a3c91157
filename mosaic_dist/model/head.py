"""Output heads: from the last hidden state to logits over the vocabulary."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_dist.model.embedding import EmbeddingModule
from mosaic_dist.model.linear import Linear
from mosaic_dist.model.matmul import linear
from mosaic_dist.model.unit import Scale, unit
from mosaic_dist.spec import Positive, Spec, SpecError


class Head(Spec):
    """Family of output heads."""

    def build(self, vocab_size: int, dim: int, embedding: EmbeddingModule) -> "HeadModule":
        """Module mapping [B, T, dim] to logits [B, T, vocab_size]."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of head")


class Tied(Head, type="tied"):
    """Logits against the embedding's own table (Press and Wolf, arXiv 1608.05859).

    Where the table is narrower than the model, the hidden state is first projected down to it.
    """

    def build(self, vocab_size: int, dim: int, embedding: EmbeddingModule) -> "HeadModule":
        """Shares `embedding.weight`; down [rank, dim] where the table is factored."""
        return TiedHead(dim, embedding.weight)


class Untied(Head, type="linear"):
    """Logits through a matrix of its own."""

    def build(self, vocab_size: int, dim: int, embedding: EmbeddingModule) -> "HeadModule":
        """weight [vocab_size, dim]."""
        return LinearHead(vocab_size, dim)


class FactoredOutput(Head, type="factored"):
    """Logits through two matrices of its own: down to `rank`, then up to the vocabulary."""

    rank: Positive

    def build(self, vocab_size: int, dim: int, embedding: EmbeddingModule) -> "HeadModule":
        """down [rank, dim], weight [vocab_size, rank]."""
        return FactoredHead(vocab_size, self.rank, dim)


class UnitHead(Head, type="unit"):
    """Logits against a table whose rows have length one, times a learned scale per token (nGPT, arXiv 2410.01131).

    From a hidden state of length one (norm `unit`) the logits are cosines at the start, so the loss is near log(vocab);
    the scales, the paper's s_z, then grow. With `tied` the table is the embedding's, which must be as wide as the
    model.
    """

    tied: bool = False

    def build(self, vocab_size: int, dim: int, embedding: EmbeddingModule) -> "HeadModule":
        """weight [vocab_size, dim], of its own or shared with the embedding; scale.weight [vocab_size]."""
        width = embedding.weight.shape[1]
        if self.tied and width != dim:
            raise SpecError(
                "tied", f"the embedding's table is {width} wide, the model {dim}; use embedding 'table', or tied=False"
            )
        return UnitLinearHead(vocab_size, dim, embedding.weight if self.tied else None)


class HeadModule(nn.Module):
    """Base of head modules: logits are the products of what `transform_input` and `transform_weight` give."""

    weight: nn.Parameter

    def forward(self, x_BTD: Tensor, measure: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """x_BTD -> logits_BTV; or what `measure` makes of their two factors, x_BTC and weight_VC, without the logits.

        Weights are for use in here only: under ZeRO-3 they are whole no longer than this runs.
        """
        product = linear if measure is None else measure
        return product(self.transform_input(x_BTD), self.transform_weight())

    def transform_input(self, x_BTD: Tensor) -> Tensor:
        """What the product sees of hidden states, [B, T, C]."""
        return x_BTD

    def transform_weight(self) -> Tensor:
        """What the product sees of the weights, [V, C]."""
        return self.weight


class TiedHead(HeadModule):
    """Head of `Tied`. `weight` is the very parameter of the embedding, registered here too so that ZeRO-3 gathers
    it.
    """

    def __init__(self, dim: int, weight_VC: nn.Parameter):
        super().__init__()
        self.weight = weight_VC
        self.down = None if weight_VC.shape[1] == dim else Linear(dim, weight_VC.shape[1], keeps_scale=True)

    def transform_input(self, x_BTD: Tensor) -> Tensor:
        """Projected down to the table."""
        return x_BTD if self.down is None else self.down(x_BTD)


class FactoredHead(HeadModule):
    """Head of `FactoredOutput`: projects to `rank` dimensions, then to the vocabulary."""

    def __init__(self, vocab_size: int, rank: int, dim: int):
        super().__init__()
        self.down = Linear(dim, rank, keeps_scale=True)
        self.weight = nn.Parameter(torch.empty(vocab_size, rank))

    def transform_input(self, x_BTD: Tensor) -> Tensor:
        """Projected down."""
        return self.down(x_BTD)


class LinearHead(HeadModule):
    """Head of `Untied`: a weight of its own."""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))


class UnitLinearHead(HeadModule):
    """Head of `UnitHead`. A shared `weight` is registered here too, as in `TiedHead`."""

    def __init__(self, vocab_size: int, dim: int, shared_VD: nn.Parameter | None):
        super().__init__()
        self.deviation = 1 / math.sqrt(dim)
        self.weight = nn.Parameter(torch.empty(vocab_size, dim)) if shared_VD is None else shared_VD
        self.scale = Scale(vocab_size, start=1.0, stored=1 / math.sqrt(dim))

    def transform_weight(self) -> Tensor:
        """Rows of length one, times their scales."""
        return unit(self.weight, 1, self.scale()[:, None])
