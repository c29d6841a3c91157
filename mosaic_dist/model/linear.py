"""Matrix layers: one weight (`Linear`), or one per expert (`GroupedLinear`).

`LinearKind` is the family of their kinds: how the weights enter the product. `ternary.py` and `unit.py` hold further
ones.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.model.matmul import linear
from mosaic_dist.spec import Spec


class Linear(nn.Linear):
    """`nn.Linear` that knows how it is to be initialised.

    `residual`: it writes into the residual stream. `keeps_scale`: its output is to be as large as its input, so its
    `deviation` is 1 / sqrt(inputs) whatever the model's (None).
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = False, residual: bool = False, keeps_scale: bool = False
    ):
        super().__init__(inputs, outputs, bias=bias)
        self.residual = residual
        self.deviation = 1 / math.sqrt(inputs) if keeps_scale else None

    def reset_parameters(self) -> None:
        """Leave the values to `init.initialize`, which draws them by parameter name."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return linear(self.transform_input(x), self.transform_weight(), self.bias)

    def transform_input(self, x: Tensor) -> Tensor:
        """What the product sees of its input."""
        return x

    def transform_weight(self) -> Tensor:
        """What the product sees of the weights, [outputs, inputs]."""
        return self.weight


class GroupedLinear(nn.Module):
    """A linear layer per expert. It holds the weights; `ffn.kernel` does the products of all experts.

    weight [e, inputs, outputs], bias [e, outputs]. `first_expert` is the model-wide index of the first expert held
    here and `total_experts` the number in the model: with `keep_experts` a layer comes to hold a part of them.
    """

    def __init__(self, experts: int, inputs: int, outputs: int, *, bias: bool = False, residual: bool = False):
        super().__init__()
        self.first_expert, self.total_experts, self.residual = 0, experts, residual
        self.weight = nn.Parameter(torch.empty(experts, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(experts, outputs)) if bias else None

    def keep_experts(self, first: int, count: int) -> None:
        """Hold only experts `first ... first + count - 1`. For a layer that has no storage yet (meta device)."""
        assert self.weight.is_meta, "keep_experts would drop weights that exist"
        self.first_expert = first
        self.weight = nn.Parameter(self.weight[:count])
        self.bias = None if self.bias is None else nn.Parameter(self.bias[:count])

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Effective weight [e, inputs, outputs] and bias [e, outputs]; a call, so that hooks can fetch them for it."""
        return self.transform_weight(), self.bias

    def transform_input(self, x_RI: Tensor) -> Tensor:
        """What the products see of their inputs."""
        return x_RI

    def transform_weight(self) -> Tensor:
        """What the products see of the weights, [e, inputs, outputs]."""
        return self.weight


class LinearKind(Spec):
    """Family of matrix layers: how the weights of a network enter its products."""

    def build(self, inputs: int, outputs: int, *, bias: bool = False, residual: bool = False) -> Linear:
        """Layer mapping [..., inputs] to [..., outputs]; weight [outputs, inputs], bias [outputs]."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of matrix")

    def build_stack(
        self, experts: int, inputs: int, outputs: int, *, bias: bool = False, residual: bool = False
    ) -> GroupedLinear:
        """Layer per expert; weight [experts, inputs, outputs], bias [experts, outputs]."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of matrix")


class PlainLinearKind(LinearKind, type="plain"):
    """The weights as they are."""

    def build(self, inputs: int, outputs: int, *, bias: bool = False, residual: bool = False) -> Linear:
        """An unmodified linear layer: weight [outputs, inputs]."""
        return Linear(inputs, outputs, bias=bias, residual=residual)

    def build_stack(
        self, experts: int, inputs: int, outputs: int, *, bias: bool = False, residual: bool = False
    ) -> GroupedLinear:
        """One unmodified matrix per expert: weight [experts, inputs, outputs]."""
        return GroupedLinear(experts, inputs, outputs, bias=bias, residual=residual)


def embed(weight_VC: Tensor, tokens_BT: Tensor) -> Tensor:
    """Rows of a table: tokens_BT int64 -> [B, T, C]."""
    return functional.embedding(tokens_BT, weight_VC)
