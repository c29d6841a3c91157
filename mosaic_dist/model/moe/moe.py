"""Mixture of experts: each token passes the `top_k` experts that its router chooses."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_dist.model.ffn.ffn import FFN, DenseFFN, Extras
from mosaic_dist.model.linear import GroupedLinear
from mosaic_dist.model.moe.exchange import LocalExchange
from mosaic_dist.model.moe.router import Router, switch_balance_loss
from mosaic_dist.spec import NonNegativeFloat, Positive, SpecError


class MoE(FFN, type="moe"):
    """Dropless token-choice mixture over any dense network (Shazeer et al., arXiv 1701.06538).

    Each expert has width `expert.width / split`: with `split = experts` a dense network is cut into experts of the
    same total size (split experts); DeepSeekMoE's fine-grained experts are `experts = macro * split`.
    `balance_weight` is the factor of the Switch balance loss.
    """

    expert: DenseFFN
    experts: Positive
    top_k: Positive = 2
    split: Positive = 1
    balance_weight: NonNegativeFloat = 0.01
    normalize_weights: bool = True

    def check(self) -> None:
        """`top_k` of `experts` can be chosen and `split` divides the width."""
        if self.top_k > self.experts:
            raise SpecError("top_k", f"{self.top_k} experts per token, but there are {self.experts} experts")
        if self.expert.width % self.split:
            raise SpecError("split", f"{self.split} must divide the expert's width ({self.expert.width})")

    def build(self, dim: int) -> nn.Module:
        """router [experts, dim] and stacked expert weights [experts, inputs, outputs]."""
        return MixtureOfExperts(self, dim)


class MixtureOfExperts(nn.Module):
    """See `MoE`. Router, exchange and experts are siblings: `exchange` can be replaced without touching the others."""

    def __init__(self, spec: MoE, dim: int):
        super().__init__()
        self.spec = spec
        self.router = Router(dim, spec.experts, spec.top_k, spec.normalize_weights)
        self.exchange: Any = LocalExchange()
        self.experts = spec.expert.build_with(
            dim, spec.expert.width // spec.split, partial(GroupedLinear, spec.experts)
        )

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Extras]:
        """x_BTD -> ([B, T, D], {balance_loss: scalar, expert_load: [E] int64 choices per expert})."""
        x_SD = x_BTD.flatten(0, -2)
        probs_SE, weights_SK, experts_SK = self.router(x_SD)
        K, D = self.spec.top_k, x_SD.shape[-1]
        order_R = experts_SK.flatten().argsort(stable=True)
        counts_E = torch.bincount(experts_SK.flatten(), minlength=self.spec.experts)
        # expand, then permute: a gradient without duplicate indices, so it is the same on every run
        rows_RD = x_SD[:, None].expand(-1, K, -1).reshape(-1, D)[order_R]
        held_RD, counts_e, plan = self.exchange.dispatch(rows_RD, counts_E)
        rows_RD = self.exchange.combine(self.experts(held_RD, counts_e), plan)
        back_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        chosen_SKD = rows_RD[back_R].unflatten(0, (-1, K))
        out_SD = (weights_SK[..., None].to(chosen_SKD.dtype) * chosen_SKD).sum(1)
        balance = self.spec.balance_weight * switch_balance_loss(probs_SE, counts_E)
        return out_SD.view_as(x_BTD), {"balance_loss": balance, "expert_load": counts_E}
