"""Causal attention in bfloat16 on a CPU, made of matrix products.

PyTorch's own kernel for CPUs spends most of its time between the products. Here a block of queries of several heads
meets all keys that it may see at once, so a softmax is one call on scores that are still in the cache. Scores of one
block at a time exist, and are made again in the backward pass (as in FlashAttention, arXiv 2205.14135, without its
running softmax): memory is linear in the sequence's length.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mosaic_dist.model.matmul import is_avx512_cpu_with

BLOCK_QUERIES = 256
BLOCK_SCORES = 2**22
"""At a time, where that leaves a head: 8 MiB of them."""


def serves_triangle(q_BNTH: Tensor, dropout: float) -> bool:
    """Whether this is the kernel for such queries: where the CPU multiplies bfloat16 itself, and nothing is dropped.

    Elsewhere it would be no faster than PyTorch's; the compiler chooses for itself.
    """
    return (
        q_BNTH.device.type == "cpu"
        and q_BNTH.dtype == torch.bfloat16
        and not dropout
        and not torch.compiler.is_compiling()
        and is_avx512_cpu_with("avx512_bf16")
    )


def attend_triangle(q_BNTH: Tensor, k_BGTH: Tensor, v_BGTU: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k) v over the keys up to each query -> [B, N, T, U].

    G divides N, as in `kernel.attend`. Gradients of gradients are refused: RuntimeError.
    """
    B, N, T, H = q_BNTH.shape
    G, U = v_BGTU.shape[1], v_BGTU.shape[3]
    stacks = q_BNTH.reshape(B * G, N // G, T, H), k_BGTH.reshape(B * G, T, H), v_BGTU.reshape(B * G, T, U)
    return _Triangle.apply(*stacks, scale).view(B, N, T, U)


class _Triangle(torch.autograd.Function):
    """J key-value heads, each with M heads of queries: q [J, M, T, H], k [J, T, H], v [J, T, U]."""

    @staticmethod
    def forward(ctx: Any, q_JMTH: Tensor, k_JTH: Tensor, v_JTU: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(q_JMTH, k_JTH, v_JTU)
        out_JMTU = q_JMTH.new_empty(*q_JMTH.shape[:3], v_JTU.shape[2])
        for heads, first, end in _query_blocks(q_JMTH):
            q_jRH = q_JMTH[heads, :, first:end].flatten(1, 2)
            weights_jRS = _block_weights(q_jRH, k_JTH[heads, :end], first, scale)
            out_jRU = torch.bmm(weights_jRS, v_JTU[heads, :end])
            out_JMTU[heads, :, first:end] = out_jRU.unflatten(1, (-1, end - first))
        return out_JMTU

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_JMTU: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_JMTH, k_JTH, v_JTU = ctx.saved_tensors
        grad_q_JMTH = torch.empty_like(q_JMTH)
        # sums over the blocks: in bfloat16 they would lose more with each one
        grad_k_JTH, grad_v_JTU = (torch.zeros_like(x, dtype=torch.float32) for x in (k_JTH, v_JTU))
        for heads, first, end in _query_blocks(q_JMTH):
            q_jRH, grad_jRU = (x[heads, :, first:end].flatten(1, 2) for x in (q_JMTH, grad_JMTU))
            k_jSH, v_jSU = k_JTH[heads, :end], v_JTU[heads, :end]
            weights_jRS = _block_weights(q_jRH, k_jSH, first, ctx.scale)
            grad_v_JTU[heads, :end] += torch.bmm(weights_jRS.mT, grad_jRU)
            grad_jRS = torch.bmm(grad_jRU, v_jSU.mT)
            grad_jRS = torch._softmax_backward_data(grad_jRS, weights_jRS, -1, weights_jRS.dtype)
            grad_k_JTH[heads, :end] += _scaled_product(grad_jRS.mT, q_jRH, ctx.scale)
            grad_q_jRH = _scaled_product(grad_jRS, k_jSH, ctx.scale)
            grad_q_JMTH[heads, :, first:end] = grad_q_jRH.unflatten(1, (-1, end - first))
        return grad_q_JMTH, grad_k_JTH.to(k_JTH.dtype), grad_v_JTU.to(v_JTU.dtype), None


def _query_blocks(q_JMTH: Tensor) -> list[tuple[slice, int, int]]:
    """(key-value heads, first query, end), all heads of a block of queries before the next block."""
    J, M, T, _ = q_JMTH.shape
    found = []
    for first in range(0, T, BLOCK_QUERIES):
        end = min(first + BLOCK_QUERIES, T)
        heads = max(1, BLOCK_SCORES // (M * (end - first) * end))
        found += [(slice(j, min(j + heads, J)), first, end) for j in range(0, J, heads)]
    return found


def _block_weights(q_jRH: Tensor, k_jSH: Tensor, first: int, scale: float) -> Tensor:
    """Softmax of the scores, [j, R, S]: the rows are queries `first` ... S - 1, once for each head of queries."""
    S = k_jSH.shape[1]
    scores_jRS = _scaled_product(q_jRH, k_jSH.mT, scale)
    scores_jRS.unflatten(1, (-1, S - first))[..., first:] += _hidden(S - first)
    return scores_jRS.softmax(-1)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b of stacks of matrices, rounded once."""
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)


@cache
def _hidden(queries: int) -> Tensor:
    """Minus infinity where a query of a block does not see a key of the same block."""
    return torch.full((queries, queries), -math.inf, dtype=torch.bfloat16, device="cpu").triu(1)
