"""Token-choice routing: which experts a token goes to, and with what weight. What every kind of router is."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.model.activation_checkpointing import remembered
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

    logits_SE: Tensor
    """What the router's matrix gives, float32."""
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
        logits_SE = functional.linear(x_SD.float(), self.weight.float(), bias_E)
        experts_SK = remembered(lambda: self.choose(logits_SE.detach()))
        probs_SE, weights_SK = self.weigh(logits_SE, experts_SK)
        return Routing(logits_SE, probs_SE, weights_SK, experts_SK)

    def choose(self, logits_SE: Tensor) -> Tensor:
        """Float32 logits -> the chosen experts of each token, [S, K] int64, the best first."""
        raise TypeError(f"{type(self).__name__} does not choose: a kind of router says how")

    def weigh(self, logits_SE: Tensor, experts_SK: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and choices -> (probs_SE, weights_SK), see `Routing`."""
        raise TypeError(f"{type(self).__name__} does not weigh: a kind of router says how")

    def balance(self, counts_E: Tensor) -> None:
        """Told how often each expert was chosen in a whole step, on all ranks together. Most kinds do not mind."""
