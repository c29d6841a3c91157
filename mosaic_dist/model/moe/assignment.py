"""From choices to rows: which tokens each expert gets, and which choices find no place."""

import math
from typing import Literal

import torch
from torch import Tensor

from mosaic_dist.model.moe.router import Routing
from mosaic_dist.model.rows import Rows


def assign(weights_SK: Tensor, experts_SK: Tensor, kept_SK: Tensor | None, experts: int) -> Rows:
    """Sort the choices by expert, in the order of the tokens within each; leave out those that are not kept."""
    S, K = experts_SK.shape
    choices_J = experts_SK.flatten()
    if kept_SK is not None:
        choices_J = choices_J.masked_fill(~kept_SK.flatten(), experts)  # behind all experts
    order_J = choices_J.argsort(stable=True)
    counts_E = count(choices_J, experts + 1)[:experts]
    order_R = order_J if kept_SK is None else order_J[: int(counts_E.sum())]
    places_J = torch.empty_like(order_J).scatter_(0, order_J, torch.arange(S * K, device=order_J.device))
    places_SK = places_J.clamp(max=order_R.shape[0]).view(S, K)
    return Rows(order_R // K, weights_SK.flatten()[order_R], places_SK, counts_E)


def count(choices_J: Tensor, kinds: int) -> Tensor:
    """How often each of the numbers 0 ... kinds - 1 occurs, [kinds] int64. `bincount` would stop a GPU's host."""
    return choices_J.new_zeros(kinds).scatter_add_(0, choices_J, torch.ones_like(choices_J))


def count_rows(choices_BJ: Tensor, kinds: int) -> Tensor:
    """The same of each row, [B, kinds]."""
    return choices_BJ.new_zeros(len(choices_BJ), kinds).scatter_add_(1, choices_BJ, torch.ones_like(choices_BJ))


def capacity(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """Places per expert for so many tokens: `factor` times an even share, rounded up (arXiv 2101.03961, equation 3)."""
    return math.ceil(factor * tokens * top_k / experts)


def within_capacity(routing: Routing, places: int, drop: Literal["position", "probs"]) -> Tensor:
    """Which choices find one of the `places` of their expert, [S, K] bool.

    "position": the earlier token has the place. "probs": the choice with the larger routing weight has it.
    """
    experts_J = routing.experts_SK.flatten()
    order_J = torch.arange(len(experts_J), device=experts_J.device)
    if drop == "probs":
        order_J = routing.weights_SK.detach().flatten().argsort(descending=True, stable=True)
    order_J = order_J[experts_J[order_J].argsort(stable=True)]
    counts_E = count(experts_J, routing.probs_SE.shape[-1])
    first_E = counts_E.cumsum(0) - counts_E
    rank_J = torch.arange(len(experts_J), device=experts_J.device) - first_E[experts_J[order_J]]
    kept_J = torch.empty_like(experts_J, dtype=torch.bool).scatter_(0, order_J, rank_J < places)
    return kept_J.view_as(routing.experts_SK)
