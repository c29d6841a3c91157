"""Vectors of length one: matrix layers and learned scales of the normalised Transformer (nGPT; arXiv 2410.01131).

The paper normalises the weights after every optimizer step. Here the products see normalised weights while the stored
ones keep whatever length they have (weight normalisation; Salimans and Kingma, arXiv 1602.07868). So no step has to
reach into the optimizer's sharded float32 copies, and any ZeRO stage, checkpoint or export will do. What differs: a
stored vector grows as it is trained, which slows its turning down; weight decay, which changes nothing else, bounds it.
"""

import math

import torch
from torch import Tensor, nn

from mosaic_dist.model.linear import GroupedLinear, Linear, LinearKind

SMALLEST_LENGTH = 1e-6
"""Shorter vectors are divided by this instead, so that a vector of zeros stays zero, with a finite gradient."""


def unit(x: Tensor, along: int = -1, gain: Tensor | float = 1.0) -> Tensor:
    """The vectors of `x` that lie along a dimension, each divided by its length; of its shape and dtype.

    `gain` broadcasts against `x` and multiplies the result. Computed in float32 or better, rounded once.
    """
    at_least = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=along, keepdim=True, dtype=at_least).clamp(min=SMALLEST_LENGTH)
    return (x * (gain / length)).to(x.dtype)


class Scale(nn.Module):
    """A learned vector [size] that starts at `start`, kept as a parameter that starts at `stored` (section 2.5).

    Adam moves a parameter by about the learning rate whatever its size, so the value moves by start / stored of that.
    """

    def __init__(self, size: int, start: float, stored: float):
        super().__init__()
        self.factor = start / stored
        self.starts = {"weight": stored}
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self) -> Tensor:
        """The value, [size]."""
        return self.weight * self.factor


class UnitLinearKind(LinearKind, type="unit"):
    """Every vector of the weights that lies along the model's width has length one.

    Those are an output's weights, or where the layer writes into the residual stream (`residual`) an input's. Other
    layers are scaled by sqrt(inputs), which keeps the size of what passes them, and with `scaled` by a learned scale
    per output that starts at one: the paper's s_u and s_v, which are stored as they are. Its queries, keys and values
    have none. (The paper has the square root in v alone; in u it changes nothing, as the block normalises the sum.)
    """

    scaled: bool = True

    def build(self, inputs: int, outputs: int, *, bias: bool = False, residual: bool = False) -> Linear:
        """A linear layer with weights of length one: weight [outputs, inputs]."""
        return UnitLinear(inputs, outputs, bias=bias, residual=residual, scaled=self.scaled)

    def build_stack(
        self, experts: int, inputs: int, outputs: int, *, bias: bool = False, residual: bool = False
    ) -> GroupedLinear:
        """One such matrix per expert: weight [experts, inputs, outputs]."""
        return UnitGroupedLinear(experts, inputs, outputs, bias=bias, residual=residual, scaled=self.scaled)


class UnitLinear(Linear):
    """Linear layer of `UnitLinearKind`. scale [outputs], absent from residual layers."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, residual: bool, scaled: bool):
        super().__init__(inputs, outputs, bias=bias, residual=residual)
        self.deviation = 1 / math.sqrt(outputs if residual else inputs)  # so the lengths start near one
        self.starts = {"scale": 1.0}
        self.scale = nn.Parameter(torch.empty(outputs)) if scaled and not residual else None

    def transform_weight(self) -> Tensor:
        """What the product sees, [outputs, inputs]."""
        if self.residual:
            return unit(self.weight, 0)
        gain = math.sqrt(self.in_features)
        return unit(self.weight, 1, gain if self.scale is None else gain * self.scale.float()[:, None])


class UnitGroupedLinear(GroupedLinear):
    """Stacked layer of `UnitLinearKind`. scale [e, outputs], absent from residual layers."""

    def __init__(self, experts: int, inputs: int, outputs: int, *, bias: bool, residual: bool, scaled: bool):
        super().__init__(experts, inputs, outputs, bias=bias, residual=residual)
        self.deviation = 1 / math.sqrt(outputs if residual else inputs)
        self.starts = {"scale": 1.0}
        self.scale = nn.Parameter(torch.empty(experts, outputs)) if scaled and not residual else None

    def keep_experts(self, first: int, count: int) -> None:
        """Drop the weights and scales of all but `count` experts, beginning with `first`."""
        super().keep_experts(first, count)
        self.scale = None if self.scale is None else nn.Parameter(self.scale[:count])

    def transform_weight(self) -> Tensor:
        """What the products see, [e, inputs, outputs]."""
        if self.residual:
            return unit(self.weight, 2)
        gain = math.sqrt(self.weight.shape[1])
        return unit(self.weight, 1, gain if self.scale is None else gain * self.scale.float()[:, None])
