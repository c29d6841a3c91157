"""What the predictions of a model cost: of all logits at once, or of a chunk of tokens at a time.

A vocabulary of 200,000 makes 1.6 billion logits of 8,192 tokens, and training needs several copies of them. In chunks
there are never more than one chunk's: its loss and what its logits give to the gradients of hidden states and weights
are computed while they are there (the idea of Hsu et al., arXiv 2410.10989). No product is made twice.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.spec import NonNegativeFloat, Positive, Spec
from mosaic_dist.targets import IGNORE_INDEX

AUTO_LOGITS = 2**28
"""At a time, where nothing else is said: 1 GiB in float32."""
ROUND_TOKENS = 128
"""Chunks of "auto" are multiples of it, which fill the tiles of matrix kernels."""


class Loss(Spec):
    """Cross-entropy of the next token, and with a `z_loss_coef` the z-loss: z_loss_coef * log(Z)^2 of each scored
    token.

    Z is the sum of the exponentiated logits, and the z-loss keeps it near one (PaLM, arXiv 2204.02311, section 5, with
    1e-4). `chunk_tokens` is how many tokens of a micro-batch have logits at a time: fewer need less memory, with values
    that are the same but for rounding. "auto" takes all of them up to AUTO_LOGITS logits, and beyond that as many
    tokens as have so many.
    """

    chunk_tokens: Positive | Literal["auto"] = "auto"
    z_loss_coef: NonNegativeFloat = 0.0

    def tokens_at_a_time(self, tokens: int, vocab_size: int) -> int:
        """Of so many tokens of a micro-batch."""
        if self.chunk_tokens != "auto":
            return min(tokens, self.chunk_tokens)
        if tokens * vocab_size <= AUTO_LOGITS:
            return tokens
        return max(ROUND_TOKENS, AUTO_LOGITS // vocab_size // ROUND_TOKENS * ROUND_TOKENS)

    def score(self, head: nn.Module, x_BTD: Tensor, targets_BT: Tensor, vocab_size: int) -> "Scores":
        """What the hidden states before the head cost; targets int64, IGNORE_INDEX where nothing is scored."""
        chunk_tokens = self.tokens_at_a_time(targets_BT.numel(), vocab_size)
        if chunk_tokens >= targets_BT.numel():
            return score_logits(head(x_BTD), targets_BT, self.z_loss_coef)
        # inside the head's own forward pass its weights are there, also where ZeRO-3 gathers them for it
        return head(x_BTD, partial(score_in_chunks, targets_BT, chunk_tokens, self.z_loss_coef))


class Scores(NamedTuple):
    """Sums over scored tokens, float32 scalars."""

    loss: Tensor
    """Cross-entropy and z-loss."""
    z_loss: Tensor
    """The z-loss in it, detached."""


def score_logits(logits_BTV: Tensor, targets_BT: Tensor, z_loss_coef: float) -> Scores:
    """Of logits that are there, in float32."""
    logits_SV, targets_S = logits_BTV.flatten(0, 1).float(), targets_BT.flatten()
    cross_entropy = functional.cross_entropy(logits_SV, targets_S, ignore_index=IGNORE_INDEX, reduction="sum")
    if not z_loss_coef:
        return Scores(cross_entropy, cross_entropy.new_zeros(()))
    squares_S = logits_SV.logsumexp(-1).square().masked_fill(targets_S == IGNORE_INDEX, 0.0)
    z_loss = z_loss_coef * squares_S.sum()
    return Scores(cross_entropy + z_loss, z_loss.detach())


def score_in_chunks(
    targets_BT: Tensor, chunk_tokens: int, z_loss_coef: float, x_BTC: Tensor, weight_VC: Tensor
) -> Scores:
    """Of the logits x @ weight^T, which are made for `chunk_tokens` tokens at a time, and gone afterwards.

    Between the forward and the backward pass lie the gradients: of x in its dtype, of the weights in float32 (or
    better), in which they are summed up; the backward pass multiplies them. Under `no_grad` there are none.
    """
    # asked for here, because inside an autograd function gradients are always off
    is_trained = torch.is_grad_enabled() and (x_BTC.requires_grad or weight_VC.requires_grad)
    words = targets_BT.flatten(), chunk_tokens, z_loss_coef, is_trained
    return Scores(*_InChunks.apply(x_BTC.flatten(0, 1), weight_VC, *words))


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_SC: Tensor,
        weight_VC: Tensor,
        targets_S: Tensor,
        chunk_tokens: int,
        z_loss_coef: float,
        is_trained: bool,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(x_SC.dtype, torch.float32)
        loss, z_loss = (x_SC.new_zeros((), dtype=exact) for _ in range(2))
        if is_trained:
            grad_x_SC, grad_weight_VC = torch.empty_like(x_SC), torch.zeros_like(weight_VC, dtype=exact)
        for first in range(0, len(x_SC), chunk_tokens):
            part = slice(first, first + chunk_tokens)
            of_chunk, z_of_chunk, grad_sV = _score_chunk(
                x_SC[part], weight_VC, targets_S[part], z_loss_coef, is_trained
            )
            loss += of_chunk
            z_loss += z_of_chunk
            if is_trained:
                grad_x_SC[part] = grad_sV @ weight_VC
                _add_product(grad_weight_VC, grad_sV, x_SC[part])
            del grad_sV  # before the next chunk's logits are made
        if is_trained:
            ctx.weight_dtype = weight_VC.dtype
            ctx.save_for_backward(grad_x_SC, grad_weight_VC)
        ctx.mark_non_differentiable(z_loss)
        return loss, z_loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_SC, grad_weight_VC = ctx.saved_tensors
        scaled_VC = torch.empty_like(grad_weight_VC, dtype=ctx.weight_dtype)
        return grad_x_SC * grad, torch.mul(grad_weight_VC, grad, out=scaled_VC), None, None, None, None


def _score_chunk(
    x_sC: Tensor, weight_VC: Tensor, targets_s: Tensor, z_loss_coef: float, is_trained: bool
) -> tuple[Tensor, Tensor, Any]:
    """Loss, the z-loss in it, and the gradient of the loss with respect to the logits, [s, V] in their dtype, or None.

    Softmax and losses are computed in float32, or better. A token that is not scored has neither loss nor gradient.
    """
    ignored_s1, right_s1 = (targets_s == IGNORE_INDEX)[:, None], targets_s.clamp(min=0)[:, None]
    logits_sV = x_sC @ weight_VC.T
    right_logit_s1 = logits_sV.gather(1, right_s1)
    log_p_sV = logits_sV.log_softmax(-1, dtype=torch.promote_types(x_sC.dtype, torch.float32))
    del logits_sV
    cross_entropy_s1 = -log_p_sV.gather(1, right_s1)
    log_z_s1 = right_logit_s1 + cross_entropy_s1
    z_loss_s1 = z_loss_coef * log_z_s1.square()
    loss, z_loss = (x_s1.masked_fill(ignored_s1, 0.0).sum() for x_s1 in (cross_entropy_s1 + z_loss_s1, z_loss_s1))
    if not is_trained:
        return loss, z_loss, None
    # by a logit, log Z has the gradient p, and the cross-entropy p less one where the logit is the right one's
    shares_s1 = (1 + 2 * z_loss_coef * log_z_s1).masked_fill(ignored_s1, 0.0)
    grad_sV = log_p_sV.exp_().mul_(shares_s1).scatter_add_(1, right_s1, ignored_s1.to(log_p_sV.dtype) - 1)
    return loss, z_loss, grad_sV.to(x_sC.dtype)


def _add_product(total_VC: Tensor, grad_sV: Tensor, x_sC: Tensor) -> None:
    """total_VC += grad^T @ x: in one step where the dtype is the same, else rounded once before it is added."""
    if total_VC.dtype == x_sC.dtype:
        total_VC.addmm_(grad_sV.T, x_sC)
    else:
        total_VC += grad_sV.T @ x_sC
