"""All experts over the tokens that chose them, in one differentiable step.

For each token the sum over its choices of weight * down(activate(in_1(x), in_2(x), ...)). Kept for the backward pass
are the tokens, and of each row the results of the input layers; the activation is computed again, and neither the
gathered rows nor the experts' outputs are kept (the gradient of a routing weight is <activation, grad @ down^T>).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mosaic_dist.model.rows import Rows, gather, spread

Activate = Callable[..., Tensor]


class Layer(NamedTuple):
    """A stack of matrices as the products see it."""

    weight_eIO: Tensor
    bias_eO: Tensor | None


def run_experts(x_SD: Tensor, rows: Rows, activate: Activate, inputs: Sequence[Layer], down: Layer) -> Tensor:
    """x_SD -> [S, D] of its dtype. An expert without rows gets zero gradients.

    Where torch has a fast grouped product (bfloat16 on GPUs with compute capability 8.0 or more) all experts are one,
    and the host waits for nothing. Elsewhere experts go one after the other, which keeps their rows in the CPU's cache.
    """
    fast = x_SD.is_cuda and x_SD.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x_SD.device) >= (8, 0)
    return (run_grouped if fast else run_in_turn)(x_SD, rows, activate, inputs, down)


# --- one expert after the other -----------------------------------------------------------------------------------


def run_in_turn(x_SD: Tensor, rows: Rows, activate: Activate, inputs: Sequence[Layer], down: Layer) -> Tensor:
    """See `run_experts`."""
    counts = rows.counts_E.tolist()
    weights_R = rows.weights_R.to(x_SD.dtype)
    flat = [tensor for layer in inputs for tensor in layer]
    return _InTurn.apply(activate, counts, x_SD, rows.tokens_R, weights_R, *down, *flat)


class _InTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activate: Activate,
        counts: list[int],
        x_SD: Tensor,
        tokens_R: Tensor,
        weights_R: Tensor,
        down_eFD: Tensor,
        down_bias_eD: Tensor | None,
        *flat: Any,  # weight and bias, or None, of each reader
    ) -> Tensor:
        out_SD = torch.zeros_like(x_SD)
        hidden: list[Tensor] = []
        for e, (tokens_r, weights_r) in enumerate(zip(tokens_R.split(counts), weights_R.split(counts), strict=True)):
            if not len(tokens_r):
                continue
            x_rD = x_SD[tokens_r]
            hidden_rF = [_linear(x_rD, flat[i], flat[i + 1], e) for i in range(0, len(flat), 2)]
            out_rD = _linear(activate(*hidden_rF), down_eFD, down_bias_eD, e)
            out_SD.index_add_(0, tokens_r, out_rD.mul_(weights_r[:, None]))
            hidden += hidden_rF
        ctx.activate, ctx.counts, ctx.layers = activate, counts, len(flat)
        ctx.save_for_backward(x_SD, tokens_R, weights_R, down_eFD, down_bias_eD, *flat, *hidden)
        return out_SD

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, tokens_R, weights_R, down_eFD, down_bias_eD, *rest = ctx.saved_tensors
        flat, hidden = rest[: ctx.layers], iter(rest[ctx.layers :])
        grad_x_SD, grad_weights_R = torch.zeros_like(x_SD), torch.empty_like(weights_R)
        parameters = (down_eFD, down_bias_eD, *flat)
        gradients: list[Any] = [None if p is None else torch.empty_like(p) for p in parameters]
        grad_down, grad_bias, *grad_flat = gradients
        split = (tensor.split(ctx.counts) for tensor in (tokens_R, weights_R, grad_weights_R))
        for e, (tokens_r, weights_r, grad_weights_r) in enumerate(zip(*split, strict=True)):
            if not len(tokens_r):
                for gradient in gradients:
                    if gradient is not None:
                        gradient[e].zero_()
                continue
            grad_rD = grad_SD[tokens_r]
            hidden_rF = [next(hidden).detach().requires_grad_() for _ in range(0, len(flat), 2)]
            with torch.enable_grad():
                active_rF = ctx.activate(*hidden_rF)
            grad_rF = torch.mm(grad_rD, down_eFD[e].T)
            torch.linalg.vecdot(active_rF.detach(), grad_rF, out=grad_weights_r)
            if grad_bias is not None:
                grad_weights_r += grad_rD @ down_bias_eD[e]
            grad_rD.mul_(weights_r[:, None])
            if grad_bias is not None:
                torch.sum(grad_rD, 0, out=grad_bias[e])
            torch.mm(active_rF.detach().T, grad_rD, out=grad_down[e])
            grads_rF = torch.autograd.grad(active_rF, hidden_rF, grad_rF.mul_(weights_r[:, None]))
            x_rD = x_SD[tokens_r]
            grad_x_rD = torch.empty_like(x_rD)
            for i, grad_rF in zip(range(0, len(flat), 2), grads_rF, strict=True):
                torch.mm(x_rD.T, grad_rF, out=grad_flat[i][e])
                if grad_flat[i + 1] is not None:
                    torch.sum(grad_rF, 0, out=grad_flat[i + 1][e])
                grad_x_rD.addmm_(grad_rF, flat[i][e].T, beta=min(i, 1))  # the first overwrites
            grad_x_SD.index_add_(0, tokens_r, grad_x_rD)
        return None, None, grad_x_SD, None, grad_weights_R, *gradients


def _linear(x_rI: Tensor, weight_eIO: Tensor, bias_eO: Tensor | None, e: int) -> Tensor:
    return torch.mm(x_rI, weight_eIO[e]) if bias_eO is None else torch.addmm(bias_eO[e], x_rI, weight_eIO[e])


# --- all experts at once ------------------------------------------------------------------------------------------


def run_grouped(x_SD: Tensor, rows: Rows, activate: Activate, inputs: Sequence[Layer], down: Layer) -> Tensor:
    """See `run_experts`."""
    ends_e = rows.counts_E.cumsum(0).to(torch.int32)
    R = len(rows.tokens_R)
    numbers_e = torch.arange(len(ends_e), device=x_SD.device)
    experts_R = numbers_e.repeat_interleave(rows.counts_E, output_size=R)

    def linear(x_RI: Tensor, layer: Layer) -> Tensor:
        out_RO = functional.grouped_mm(x_RI, layer.weight_eIO, offs=ends_e)
        return out_RO if layer.bias_eO is None else out_RO + layer.bias_eO[experts_R]

    def finish(*hidden_RF: Tensor) -> Tensor:
        weights_R1 = rows.weights_R.to(x_SD.dtype)[:, None]
        out_RD = functional.grouped_mm(activate(*hidden_RF) * weights_R1, down.weight_eIO, offs=ends_e)
        return out_RD if down.bias_eO is None else out_RD + weights_R1 * down.bias_eO[experts_R]

    x_RD = spread(x_SD, rows)
    hidden_RF = [linear(x_RD, layer) for layer in inputs]
    # the second run ends where the product would begin: only the activation is computed again
    out_RD = checkpoint(finish, *hidden_RF, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    return gather(out_RD, rows)
