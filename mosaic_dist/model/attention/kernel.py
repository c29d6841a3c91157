"""Softmax attention in two forms with the same numbers: PyTorch's fused kernels, and every step written out."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mosaic_dist.model.attention.cpu_kernel import attend_triangle, serves_triangle

Kernel = Literal["sdpa", "explicit"]
ALIGNED_WIDTH = 8
"""The memory-efficient kernel, which serves masks, wants heads whose width is a multiple of it (PyTorch's
check_head_dim_size_mem_efficient in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, 16-bit tensors); others would
be computed written out."""


def attend(
    q_BNTH: Tensor,
    k_BGSH: Tensor,
    v_BGSU: Tensor,
    *,
    visible: Tensor | None,
    bias: Tensor | None = None,
    sinks_NT: Tensor | None = None,
    logit_softcap: float | None = None,
    dropout: float = 0.0,
    kernel: Kernel = "sdpa",
) -> Tensor:
    """softmax(q k / sqrt(H) + bias) v over the visible keys -> [B, N, T, U].

    Each of the G key-value heads serves N / G query heads in a row. `visible` is bool, broadcastable to [B, N, T, S];
    None is the lower triangle of as many keys as queries. `bias` is added to the scores. `sinks_NT`, [N, T] or [N, 1],
    is one more logit per query that takes part in the softmax and has no value (gpt-oss; Xiao et al., arXiv
    2309.17453). `logit_softcap` bounds scores by cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118); it needs the
    explicit form.
    """
    if kernel == "explicit":
        return _explicit(q_BNTH, k_BGSH, v_BGSU, visible, bias, sinks_NT, logit_softcap, dropout)
    assert logit_softcap is None, "a soft cap needs the explicit kernel; specs refuse the pair"
    (T, H), U = q_BNTH.shape[-2:], v_BGSU.shape[-1]
    scale = 1 / math.sqrt(H)
    mask = None if visible is None and bias is None else _float_mask(q_BNTH, visible, bias)
    if sinks_NT is not None:
        q_BNTH, k_BGSH, v_BGSU = _add_sink_key(q_BNTH, k_BGSH, v_BGSU, sinks_NT / scale)
        if mask is None:  # the triangle begins at the sink's key: a row before the first query keeps it one
            q_BNTH = functional.pad(q_BNTH, (0, 0, 1, 0))
        else:
            mask = functional.pad(mask, (1, 0), value=float(mask.dtype == torch.bool))
    if mask is None and serves_triangle(q_BNTH, dropout):
        return attend_triangle(q_BNTH, k_BGSH, v_BGSU, scale)[:, :, -T:]
    width = max(q_BNTH.shape[-1], U)  # the kernels that need no [T, S] at all want one width
    q_BNTH, k_BGSH, v_BGSU = (
        x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1])) for x in (q_BNTH, k_BGSH, v_BGSU)
    )
    group = q_BNTH.shape[1] // k_BGSH.shape[1]
    if group > 1 and not takes_groups(q_BNTH, k_BGSH, v_BGSU, mask, dropout):
        k_BGSH, v_BGSU = (x.repeat_interleave(group, 1) for x in (k_BGSH, v_BGSU))
    out_BNTU = functional.scaled_dot_product_attention(
        q_BNTH,
        k_BGSH,
        v_BGSU,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q_BNTH.shape[1] != k_BGSH.shape[1],
    )
    return out_BNTU[:, :, out_BNTU.shape[2] - T :, :U]


def takes_groups(q_BNTH: Tensor, k_BGSH: Tensor, v_BGSU: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether a fused kernel shares key-value heads here. Where none does, PyTorch would write all scores out."""
    if not q_BNTH.is_cuda:
        return True
    needs_grad = q_BNTH.requires_grad or k_BGSH.requires_grad or v_BGSU.requires_grad
    return mask is None and flash_shares_heads(q_BNTH.device, q_BNTH.dtype, q_BNTH.shape[-1], dropout, needs_grad)


def flash_shares_heads(device: torch.device, dtype: torch.dtype, width: int, dropout: float, needs_grad: bool) -> bool:
    """Whether the flash kernel takes causal attention with fewer key-value heads than query heads.

    A question of plain values, so that compiled code can have the answer as a constant (see `compile_layers`): torch
    2.11 cannot compile the question itself.
    """
    q, kv = (torch.empty(1, heads, 2, width, device=device, dtype=dtype, requires_grad=needs_grad) for heads in (2, 1))
    return torch.backends.cuda.can_use_flash_attention(
        torch.backends.cuda.SDPAParams(q, kv, kv, None, dropout, True, True)
    )


def _triangle(q_BNTH: Tensor) -> Tensor:
    T = q_BNTH.shape[-2]
    return torch.ones(1, 1, T, T, dtype=torch.bool, device=q_BNTH.device).tril()


def _float_mask(q_BNTH: Tensor, visible: Tensor | None, bias: Tensor | None) -> Tensor:
    """What SDPA adds to the scores; a bool mask is passed on as it is."""
    visible = _triangle(q_BNTH) if visible is None else visible
    return visible if bias is None else bias.to(q_BNTH.dtype).masked_fill(~visible, -math.inf)


def _add_sink_key(q_BNTH: Tensor, k_BGSH: Tensor, v_BGSU: Tensor, sinks_NT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make the sink an ordinary key, the first: one more dimension, which is the sink in queries and 1 in its key only.

    Its value is zero. So the fused kernels compute it, gradient included, and key-value heads stay shared. Zeros after
    the new dimension fill the heads up to ALIGNED_WIDTH.
    """
    B, _, T, H = q_BNTH.shape
    zeros = -(H + 1) % ALIGNED_WIDTH
    sinks = sinks_NT.to(q_BNTH.dtype)[None, :, :, None].expand(B, -1, T, -1)
    q = functional.pad(torch.cat([q_BNTH, sinks], -1), (0, zeros))
    sink_key = functional.pad(k_BGSH.new_ones(1), (H, zeros)).expand(*k_BGSH.shape[:2], 1, -1)
    k = torch.cat([sink_key, functional.pad(k_BGSH, (0, 1 + zeros))], 2)
    return q, k, functional.pad(v_BGSU, (0, 0, 1, 0))


def _explicit(
    q_BNTH: Tensor,
    k_BGSH: Tensor,
    v_BGSU: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    sinks_NT: Tensor | None,
    logit_softcap: float | None,
    dropout: float,
) -> Tensor:
    """Scores, mask and softmax as in the formula, the softmax in float32."""
    group = q_BNTH.shape[1] // k_BGSH.shape[1]
    k_BNSH, v_BNSU = (x.repeat_interleave(group, 1) for x in (k_BGSH, v_BGSU))
    scores = (q_BNTH @ k_BNSH.transpose(-2, -1)).float() / math.sqrt(q_BNTH.shape[-1])
    if logit_softcap is not None:
        scores = logit_softcap * torch.tanh(scores / logit_softcap)
    if bias is not None:
        scores = scores + bias.float()
    scores = scores.masked_fill(~(_triangle(q_BNTH) if visible is None else visible), -math.inf)
    if sinks_NT is not None:
        sink = sinks_NT.float()[None, :, :, None].expand(*scores.shape[:2], scores.shape[2], 1)
        weights = torch.cat([sink, scores], -1).softmax(-1)[..., 1:]
    else:
        weights = scores.softmax(-1)
    weights = functional.dropout(weights, dropout, training=dropout > 0)
    return weights.to(q_BNTH.dtype) @ v_BNSU
