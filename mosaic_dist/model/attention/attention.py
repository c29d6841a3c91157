"""What every kind of attention is, and the two ways to compute softmax attention."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.spec import Spec


class Attention(Spec):
    """Family of causal attentions."""

    def build(self, dim: int) -> nn.Module:
        """Module mapping [B, T, dim] to [B, T, dim], where token t sees tokens 0 ... t only."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of attention")


def sdpa_attention(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, dropout: float) -> Tensor:
    """Causal softmax attention by PyTorch's fused kernels; memory linear in T where a flash kernel applies."""
    return functional.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, dropout_p=dropout, is_causal=True)


def explicit_attention(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, dropout: float) -> Tensor:
    """The same with the [T, T] mask and scores written out; softmax in float32. For reading and for tests."""
    scores_BNTT = q_BNTH @ k_BNTH.transpose(-2, -1) / math.sqrt(q_BNTH.shape[-1])
    T = q_BNTH.shape[-2]
    visible_TT = torch.ones(T, T, dtype=torch.bool, device=q_BNTH.device).tril()
    weights_BNTT = scores_BNTT.float().masked_fill(~visible_TT, -math.inf).softmax(-1).to(q_BNTH.dtype)
    return functional.dropout(weights_BNTT, dropout, training=dropout > 0) @ v_BNTH


KERNELS = {"sdpa": sdpa_attention, "explicit": explicit_attention}
