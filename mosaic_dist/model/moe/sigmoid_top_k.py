"""Router: a sigmoid score per expert, corrected for the choice (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

import torch
from torch import Tensor

from mosaic_dist.model.moe.router import Router, RouterModule
from mosaic_dist.spec import NonNegativeFloat, Positive, PositiveFloat, SpecError

GROUP_SCORES = 2
"""A group is as good as the sum of its best two experts (DeepSeek-V3's reference code, `inference/model.py`)."""


class SigmoidTopK(Router, type="sigmoid_top_k"):
    """Sigmoid scores; the `top_k` best of score + correction are chosen, and weigh in by their score alone.

    With `normalize` the weights of a token sum to `scale`, else each is the score times `scale`. With `num_groups` the
    experts lie in that many groups of neighbours and only the best `topk_groups` of them are chosen from.

    The bias of each expert is a buffer outside the gradient, zero at the start. With an `expert_bias_update_rate`
    it balances the load without a loss (arXiv 2408.15664, algorithm 1): after each step it grows by the rate where an
    expert was chosen less often than the mean in the global batch, and shrinks where more often; DeepSeek-V3 took
    0.001. It is kept by checkpoints and exports.

    The balance loss sees the scores divided by their sum over all experts (arXiv 2412.19437, equations 17 to 20) and
    counts the choices that were made, bias included; `aux_loss_scope: sequence` is that paper's.
    """

    normalize: bool = True
    scale: PositiveFloat = 1.0
    num_groups: Positive = 1
    topk_groups: Positive = 1
    expert_bias_update_rate: NonNegativeFloat = 0.0

    def check_choice(self, experts: int, top_k: int) -> None:
        """The groups are equal, and enough experts are left in the best of them."""
        if experts % self.num_groups:
            raise SpecError("num_groups", f"{self.num_groups} must divide the experts ({experts})")
        if self.topk_groups > self.num_groups:
            raise SpecError(
                "topk_groups", f"{self.topk_groups} groups to choose, but there are {self.num_groups} groups"
            )
        left = experts // self.num_groups * self.topk_groups
        if top_k > left:
            raise SpecError("topk_groups", f"{self.topk_groups} leaves {left} experts, but top_k is {top_k}")

    def build(self, dim: int, experts: int, top_k: int, bias: bool) -> RouterModule:
        """Router over `experts` scores, with a bias per expert."""
        return SigmoidTopKRouter(self, dim, experts, top_k, bias)


class SigmoidTopKRouter(RouterModule):
    """Chooses by sigmoid scores plus a bias. Buffer `expert_bias` [experts] float32, part of the state of a run.

    It is made on the CPU whatever the default device: on the meta device it would have no zeros to start from.
    """

    expert_bias: Tensor

    def __init__(self, spec: SigmoidTopK, dim: int, experts: int, top_k: int, bias: bool):
        super().__init__(dim, experts, top_k, bias)
        self.spec = spec
        self.register_buffer("expert_bias", torch.zeros(experts, dtype=torch.float32, device="cpu"))

    def choose(self, logits_SE: Tensor) -> Tensor:
        """The `top_k` largest biased scores of each token, within the best groups."""
        return self._best(logits_SE.sigmoid() + self.expert_bias)

    def weigh(self, logits_SE: Tensor, experts_SK: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen scores, normalised and scaled, and each token's scores divided by their sum."""
        scores_SE = logits_SE.sigmoid()
        weights_SK = scores_SE.gather(-1, experts_SK)
        if self.spec.normalize:
            weights_SK = weights_SK / (weights_SK.sum(-1, keepdim=True) + 1e-20)  # all scores can underflow
        shares_SE = scores_SE / (scores_SE.sum(-1, keepdim=True) + 1e-20)
        return shares_SE, weights_SK * self.spec.scale

    @torch.no_grad()
    def balance(self, counts_E: Tensor) -> None:
        """Move the correction towards the experts that got too little; counts_E of a whole step."""
        counts_E = counts_E.to(self.expert_bias)
        self.expert_bias += self.spec.expert_bias_update_rate * (counts_E.mean() - counts_E).sign()

    def _best(self, scores_SE: Tensor) -> Tensor:
        """Indices of the best experts of the best groups, [S, K]."""
        if self.spec.num_groups > 1:
            grouped = scores_SE.unflatten(-1, (self.spec.num_groups, -1))  # [S, groups, experts of a group]
            merit = grouped.topk(min(GROUP_SCORES, grouped.shape[-1]), dim=-1).values.sum(-1)
            best = merit.topk(self.spec.topk_groups, dim=-1).indices
            left_out = torch.ones_like(merit, dtype=torch.bool).scatter(-1, best, False)
            # -inf as in the reference code; the 0 of some others would win over a corrected score below it
            scores_SE = grouped.masked_fill(left_out[..., None], -torch.inf).flatten(-2)
        return scores_SE.topk(self.top_k, dim=-1).indices
