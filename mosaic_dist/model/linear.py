"""Matrix layers: one weight (`Linear`), or one per expert over rows sorted by expert (`GroupedLinear`)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Linear(nn.Linear):
    """`nn.Linear` that knows how it is to be initialised.

    `residual`: it writes into the residual stream. `keeps_scale`: its output is to be as large as its input, so its
    deviation is 1 / sqrt(inputs) whatever the model's.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = False, residual: bool = False, keeps_scale: bool = False
    ):
        super().__init__(inputs, outputs, bias=bias)
        self.residual, self.keeps_scale = residual, keeps_scale

    def reset_parameters(self) -> None:
        """Leave the values to `init.initialize`, which draws them by parameter name."""


class GroupedLinear(nn.Module):
    """A linear layer per expert: rows of expert 0 first, then of expert 1, ... each times its own matrix.

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

    def forward(self, x_RI: Tensor, counts_e: Sequence[int]) -> Tensor:
        """x_RI [R, inputs] sorted by expert, counts_e[i] rows for local expert i -> [R, outputs]."""
        rows = [chunk @ self.weight[i] for i, chunk in enumerate(x_RI.split(list(counts_e)))]
        if self.bias is not None:
            rows = [row + self.bias[i] for i, row in enumerate(rows)]
        return torch.cat(rows)


def embed(weight_VC: Tensor, tokens_BT: Tensor) -> Tensor:
    """Rows of a table: tokens_BT int64 -> [B, T, C]."""
    return functional.embedding(tokens_BT, weight_VC)
