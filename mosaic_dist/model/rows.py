"""Tokens copied into rows that are sorted by expert, and rows summed back into tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """R rows sorted by expert: row r is token `tokens_R[r]`, and its result counts `weights_R[r]` times."""

    tokens_R: Tensor
    """Index of the token, int64."""
    weights_R: Tensor
    """Routing weight, with gradient."""
    places_SK: Tensor
    """Rows of each token, int64, K of them; R stands for none."""
    counts_E: Tensor
    """Rows per expert, int64."""


def permute(x_SD: Tensor, rows: Rows) -> Tensor:
    """x_SD -> [R, D]. The gradient of a token is summed in the order of its places, so every run gives the same."""
    return _Spread.apply(x_SD, rows.tokens_R, rows.places_SK)


def unpermute(x_RD: Tensor, rows: Rows) -> Tensor:
    """x_RD -> [S, D], the sum of the rows of each token: the transpose of `spread`. Weights play no part."""
    return _Gather.apply(x_RD, rows.tokens_R, rows.places_SK)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, tokens_R: Tensor, places_SK: Tensor) -> Tensor:
        ctx.save_for_backward(places_SK)
        return x_SD[tokens_R]

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (places_SK,) = ctx.saved_tensors
        return _sum_places(grad_RD, places_SK), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, tokens_R: Tensor, places_SK: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_R)
        return _sum_places(x_RD, places_SK)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        (tokens_R,) = ctx.saved_tensors
        return grad_SD[tokens_R], None, None


def _sum_places(x_RD: Tensor, places_SK: Tensor) -> Tensor:
    """[S, D]; place R is a row of zeros."""
    padded_RD = torch.cat([x_RD, x_RD.new_zeros(1, x_RD.shape[1])])
    return padded_RD[places_SK].sum(1)
