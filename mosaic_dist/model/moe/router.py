"""Token-choice routing: which experts a token goes to, and with what weight."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Routing(NamedTuple):
    """The choices of S tokens among E experts, K each."""

    probs_SE: Tensor
    """Softmax over all experts, float32."""
    weights_SK: Tensor
    """Weight of each chosen expert, float32, with gradient."""
    experts_SK: Tensor
    """Index of each chosen expert, int64."""


class Router(nn.Module):
    """Softmax over all experts, then the `top_k` largest; computed in float32 (Switch, arXiv 2101.03961).

    With `normalize` the weights of the chosen experts are scaled to sum to one (Mixtral, arXiv 2401.04088).
    """

    def __init__(self, dim: int, experts: int, top_k: int, normalize: bool):
        super().__init__()
        self.top_k, self.normalize = top_k, normalize
        self.weight = nn.Parameter(torch.empty(experts, dim))

    def forward(self, x_SD: Tensor) -> Routing:
        """x_SD -> Routing."""
        probs_SE = functional.linear(x_SD.float(), self.weight.float()).softmax(-1)
        weights_SK, experts_SK = probs_SE.topk(self.top_k, dim=-1)
        if self.normalize:
            weights_SK = weights_SK / weights_SK.sum(-1, keepdim=True)
        return Routing(probs_SE, weights_SK, experts_SK)


def switch_balance_loss(probs_SE: Tensor, counts_E: Tensor) -> Tensor:
    """E * sum_e f_e * P_e with f_e the share of choices and P_e the mean probability of expert e.

    Switch Transformer, arXiv 2101.03961, equations 4 to 6, over the tokens of this micro-batch. It is 1 for a perfect
    balance. The gradient flows through P_e only.
    """
    share_E = counts_E.to(probs_SE.dtype) / counts_E.sum()
    return probs_SE.shape[-1] * (share_E * probs_SE.mean(0)).sum()
