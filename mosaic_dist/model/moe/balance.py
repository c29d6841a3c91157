"""Losses that keep a router in order. Each is 1, or 0, when nothing is wrong, before its weight."""

import torch
from torch import Tensor


def balance_loss(probs_SE: Tensor, counts_E: Tensor) -> Tensor:
    """E * sum_e f_e * P_e with f_e the share of choices and P_e the mean probability of expert e.

    Switch Transformer, arXiv 2101.03961, equations 4 to 6. It is 1 for a perfect balance. `counts_E` are of the tokens
    of `probs_SE`, or of more (arXiv 2501.11873: of the global batch). The gradient flows through P_e only.
    """
    share_E = counts_E.to(probs_SE.dtype) / counts_E.sum().clamp(min=1)
    return probs_SE.shape[-1] * (share_E * probs_SE.mean(0)).sum()


def sequence_balance_loss(probs_BTE: Tensor, counts_BE: Tensor) -> Tensor:
    """The mean over sequences of the balance loss of each (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

    `counts_BE` are of the tokens of `probs_BTE`, or of more of the same sequences.
    """
    share_BE = counts_BE.to(probs_BTE.dtype) / counts_BE.sum(-1, keepdim=True)
    return probs_BTE.shape[-1] * (share_BE * probs_BTE.mean(1)).sum(-1).mean()


def z_loss(logits_SE: Tensor) -> Tensor:
    """Mean of logsumexp(logits) squared: holds logits near zero (ST-MoE, arXiv 2202.08906, equation 5)."""
    return logits_SE.logsumexp(-1).square().mean()


def routing_entropy(probs_SE: Tensor) -> Tensor:
    """Mean over tokens of the entropy of the router's distribution, in nats; ln E when it has no preference."""
    return torch.special.entr(probs_SE).sum(-1).mean()
