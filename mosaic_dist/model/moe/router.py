"""Token-choice routing: which experts a token goes to, and with what weight. What every kind of router is."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.spec import Spec


class Router(Spec):
    """Family of routers."""

    def check_choice(self, experts: int, top_k: int) -> None:
        """Refuse numbers of experts and choices that this kind cannot serve: raise `SpecError(field, reason)`."""

    def build(self, dim: int, experts: int, top_k: int, bias: bool) -> "RouterModule":
        """Module mapping x_SD to `Routing`."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of router")


class Routing(NamedTuple):
    """The choices of S tokens among E experts, K each."""

    probs_SE: Tensor
    """Share of each expert in each token's scores, float32, summing to one over E: for the balance loss."""
    weights_SK: Tensor
    """Weight of each chosen expert, float32, with gradient."""
    experts_SK: Tensor
    """Index of each chosen expert, int64."""


class RouterModule(nn.Module):
    """A linear layer to one logit per expert, in float32 (Switch, arXiv 2101.03961); kinds differ in the choice.

    weight [experts, dim], bias [experts] where asked (gpt-oss).
    """

    def __init__(self, dim: int, experts: int, top_k: int, bias: bool):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.bias = nn.Parameter(torch.empty(experts)) if bias else None

    def forward(self, x_SD: Tensor) -> Routing:
        """x_SD -> Routing."""
        bias_E = None if self.bias is None else self.bias.float()
        return self.choose(functional.linear(x_SD.float(), self.weight.float(), bias_E))

    def choose(self, logits_SE: Tensor) -> Routing:
        """Float32 logits -> Routing."""
        raise TypeError(f"{type(self).__name__} does not choose: a kind of router says how")


def switch_balance_loss(probs_SE: Tensor, counts_E: Tensor) -> Tensor:
    """E * sum_e f_e * P_e with f_e the share of choices and P_e the mean probability of expert e.

    Switch Transformer, arXiv 2101.03961, equations 4 to 6, over the tokens of this micro-batch. It is 1 for a perfect
    balance. The gradient flows through P_e only.
    """
    share_E = counts_E.to(probs_SE.dtype) / counts_E.sum()
    return probs_SE.shape[-1] * (share_E * probs_SE.mean(0)).sum()
