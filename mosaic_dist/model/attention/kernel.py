"""Softmax attention in two forms with the same numbers: PyTorch's fused kernels, and every step written out."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Kernel = Literal["sdpa", "explicit"]
ALIGNED_WIDTH = 8
"""Fused kernels with a mask want heads whose width is a multiple of it (check_head_dim_size_mem_efficient in PyTorch's
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, 16-bit tensors); others would be computed written out."""


def attend(
    q_BNTH: Tensor,
    k_BGSH: Tensor,
    v_BGSH: Tensor,
    *,
    visible: Tensor | None,
    bias: Tensor | None = None,
    sinks_N: Tensor | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    kernel: Kernel = "sdpa",
) -> Tensor:
    """softmax(q k / sqrt(H) + bias) v over the visible keys -> [B, N, T, width of v].

    Each of the G key-value heads serves N / G query heads in a row. `visible` is bool, broadcastable to [B, N, T, S];
    None is the lower triangle of as many keys as queries. `bias` is added to the scores. `sinks_N` is one more logit
    per head that takes part in the softmax and has no value (gpt-oss; Xiao et al., arXiv 2309.17453). `soft_cap` bounds
    scores by cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118); it needs the explicit form.
    """
    if kernel == "explicit":
        return _explicit(q_BNTH, k_BGSH, v_BGSH, visible, bias, sinks_N, soft_cap, dropout)
    assert soft_cap is None, "a soft cap needs the explicit kernel; specs refuse the pair"
    scale = 1 / math.sqrt(q_BNTH.shape[-1])
    if sinks_N is not None:
        visible = _triangle(q_BNTH) if visible is None else visible
        q_BNTH, k_BGSH, v_BGSH, visible, bias = _add_sink_key(q_BNTH, k_BGSH, v_BGSH, visible, bias, sinks_N, scale)
    mask = None if visible is None and bias is None else _float_mask(q_BNTH, visible, bias)
    return functional.scaled_dot_product_attention(
        q_BNTH,
        k_BGSH,
        v_BGSH,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q_BNTH.shape[1] != k_BGSH.shape[1],
    )


def _triangle(q_BNTH: Tensor) -> Tensor:
    T = q_BNTH.shape[-2]
    return torch.ones(1, 1, T, T, dtype=torch.bool, device=q_BNTH.device).tril()


def _float_mask(q_BNTH: Tensor, visible: Tensor | None, bias: Tensor | None) -> Tensor:
    """What SDPA adds to the scores; a bool mask is passed on as it is."""
    visible = _triangle(q_BNTH) if visible is None else visible
    return visible if bias is None else bias.to(q_BNTH.dtype).masked_fill(~visible, -math.inf)


def _add_sink_key(
    q_BNTH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, visible: Tensor, bias: Tensor | None, sinks_N: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Make the sink an ordinary key: one more dimension, which is 1 in queries and sink / scale in the sink's key.

    Its value is zero. So the fused kernels compute it, gradient included, without a mask that has a gradient. Zeros
    after the new dimension fill the heads up to ALIGNED_WIDTH.
    """
    B, N, _, H = q_BNTH.shape
    group, zeros = N // k_BGSH.shape[1], -(H + 1) % ALIGNED_WIDTH
    k_BNSH, v_BNSH = (x.repeat_interleave(group, 1) for x in (k_BGSH, v_BGSH))
    q = functional.pad(functional.pad(q_BNTH, (0, 1), value=1.0), (0, zeros))
    sink_key = functional.pad((sinks_N / scale).to(k_BNSH.dtype)[None, :, None, None], (H, zeros))
    k = torch.cat([sink_key.expand(B, -1, -1, -1), functional.pad(k_BNSH, (0, 1 + zeros))], 2)
    v = functional.pad(v_BNSH, (0, 0, 1, 0))
    bias = None if bias is None else functional.pad(bias, (1, 0))
    return q, k, v, functional.pad(visible, (1, 0), value=True), bias


def _explicit(
    q_BNTH: Tensor,
    k_BGSH: Tensor,
    v_BGSH: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    sinks_N: Tensor | None,
    soft_cap: float | None,
    dropout: float,
) -> Tensor:
    """Scores, mask and softmax as in the formula, the softmax in float32."""
    group = q_BNTH.shape[1] // k_BGSH.shape[1]
    k_BNSH, v_BNSH = (x.repeat_interleave(group, 1) for x in (k_BGSH, v_BGSH))
    scores = (q_BNTH @ k_BNSH.transpose(-2, -1)).float() / math.sqrt(q_BNTH.shape[-1])
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias.float()
    scores = scores.masked_fill(~(_triangle(q_BNTH) if visible is None else visible), -math.inf)
    if sinks_N is not None:
        sink = sinks_N.float()[None, :, None, None].expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([sink, scores], -1).softmax(-1)[..., 1:]
    else:
        weights = scores.softmax(-1)
    weights = functional.dropout(weights, dropout, training=dropout > 0)
    return weights.to(q_BNTH.dtype) @ v_BNSH
