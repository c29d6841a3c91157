"""Mixture of experts: each token passes the `top_k` experts that its router chooses, and the shared ones."""

from typing import Any

import torch
from torch import Tensor, nn

from mosaic_dist.model.ffn import FFN, DenseFFN, Extras, SwiGLU
from mosaic_dist.model.moe.exchange import LocalExchange
from mosaic_dist.model.moe.router import Router, switch_balance_loss
from mosaic_dist.model.moe.softmax_top_k import SoftmaxTopK
from mosaic_dist.spec import NonNegative, NonNegativeFloat, Positive, SpecError, at, fields


class Mixture(FFN):
    """Dropless token-choice mixture (Shazeer et al., arXiv 1701.06538): all of a mixture but what its experts are.

    Each expert has the width of the expert spec divided by `split`: with `split = experts` a dense network is cut into
    experts of the same total size (split experts); DeepSeekMoE's fine-grained experts (arXiv 2401.06066) are
    `experts = macro * split`. Its shared experts are those that every token passes beside the chosen ones, each as
    wide as a routed one. `router_bias` gives the router's logits a learned bias. `balance_weight` is the factor of the
    balance loss.
    """

    experts: Positive
    top_k: Positive = 2
    shared_experts: NonNegative = 0
    split: Positive = 1
    router: Router = SoftmaxTopK()
    router_bias: bool = False
    balance_weight: NonNegativeFloat = 0.01


class MoE(Mixture, type="moe"):
    """Mixture over any dense network."""

    expert: DenseFFN

    def check(self) -> None:
        """`top_k` of `experts` can be chosen and `split` divides the width."""
        if self.top_k > self.experts:
            raise SpecError("top_k", f"{self.top_k} experts per token, but there are {self.experts} experts")
        if self.expert.width % self.split:
            raise SpecError("split", f"{self.split} must divide the expert's width ({self.expert.width})")
        with at("router"):
            self.router.check_choice(self.experts, self.top_k)

    def build(self, dim: int) -> nn.Module:
        """See `MixtureOfExperts`."""
        return MixtureOfExperts(self, dim)


class MoESwiGLU(Mixture, type="moe_swiglu"):
    """Short form of a mixture whose experts are SwiGLU networks of hidden width `width`."""

    width: Positive

    def check(self) -> None:
        """The long form is well-formed."""
        self.written_out()

    def written_out(self) -> MoE:
        """The long form."""
        return MoE(expert=SwiGLU(width=self.width), **{name: getattr(self, name) for name in fields(Mixture)})

    def build(self, dim: int) -> nn.Module:
        """The module of the long form."""
        return self.written_out().build(dim)


class MixtureOfExperts(nn.Module):
    """See `Mixture`. Router, exchange and experts are siblings: `exchange` can be replaced without touching the others.

    router.weight [experts, dim]; the weights of `experts` are stacked, [experts, inputs, outputs]; `shared` is one
    network as wide as all shared experts together, or None: their sum, with one output bias and one ternary scale.
    """

    def __init__(self, spec: MoE, dim: int):
        super().__init__()
        self.spec = spec
        width = spec.expert.width // spec.split
        self.router = spec.router.build(dim, spec.experts, spec.top_k, spec.router_bias)
        self.exchange: Any = LocalExchange()
        self.experts = spec.expert.build_experts(dim, width, spec.experts)
        self.shared = spec.expert.build_network(dim, spec.shared_experts * width) if spec.shared_experts else None

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
        if self.shared is not None:
            out_SD = out_SD + self.shared(x_SD)
        balance = self.spec.balance_weight * switch_balance_loss(probs_SE, counts_E)
        return out_SD.view_as(x_BTD), {"balance_loss": balance, "expert_load": counts_E}
