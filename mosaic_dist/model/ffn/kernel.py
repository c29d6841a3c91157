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

from mosaic_dist.model.matmul import multiply, multiply_into, rounded_rows
from mosaic_dist.model.rows import Rows, permute, unpermute

Activate = Callable[..., Tensor]


class Layer(NamedTuple):
    """A stack of matrices as the products see it."""

    weight_eIO: Tensor
    bias_eO: Tensor | None


def run_experts(x_SD: Tensor, rows: Rows, activate: Activate, inputs: Sequence[Layer], down: Layer) -> Tensor:
    """x_SD -> [S, D] of its dtype. An expert without rows gets zero gradients.

    Where torch has a fast grouped product (bfloat16, see `has_grouped_product`) all experts are one, and the host waits
    for nothing. Elsewhere experts go one after the other, which keeps their rows in the CPU's cache; on a GPU the host
    waits once for their counts.
    """
    is_grouped = x_SD.dtype == torch.bfloat16 and has_grouped_product(x_SD.device)
    is_grouped |= torch.compiler.is_exporting()  # which has no counts to cut the rows by
    return (run_grouped if is_grouped else run_in_turn)(x_SD, rows, activate, inputs, down)


def has_grouped_product(device: torch.device) -> bool:
    """Whether torch has a kernel for the product of all experts in bfloat16 on a device.

    On other GPUs `grouped_mm` loops over the experts and waits for the counts in each product, forward and backward
    (aten/src/ATen/native/cuda/GroupedBlas.cpp).
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


def _leaves_gradients_unwritten(device: torch.device) -> bool:
    """Whether `grouped_mm` was seen to give experts without rows gradients that are not zero (pytorch issue 172439)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


# --- one expert after the other -----------------------------------------------------------------------------------


def run_in_turn(x_SD: Tensor, rows: Rows, activate: Activate, inputs: Sequence[Layer], down: Layer) -> Tensor:
    """The same as `run_experts`, one expert after the other, whose rows then stay in a CPU's cache."""
    counts, weights_R = rows.counts_E.tolist(), rows.weights_R.to(x_SD.dtype)
    flat = [tensor for layer in (*inputs, down) for tensor in layer]
    return _InTurn.apply(activate, counts, x_SD, rows.tokens_R, weights_R, *flat)


class _InTurn(torch.autograd.Function):
    """`flat`: weight and bias, or None, of each layer that reads the tokens, and of down.

    For few rows the calls themselves count: `index_select` is the short way to rows, one `unbind` that to matrices. An
    expert's r rows become p, the number that the products want; those after them are zeros where they are read, and
    what they give is left out.
    """

    @staticmethod
    def forward(
        ctx: Any, activate: Activate, counts: list[int], x_SD: Tensor, tokens_R: Tensor, weights_R: Tensor, *flat: Any
    ) -> Tensor:
        *readers, down = _stacks(flat)
        out_SD = torch.zeros_like(x_SD)
        hidden: list[Tensor] = []
        for e, (tokens_r, weights_r) in enumerate(zip(tokens_R.split(counts), weights_R.split(counts), strict=True)):
            if counts[e]:
                x_pD = _select(x_SD, tokens_r, rounded_rows(x_SD, down.weight_IO[e], counts[e]))
                hidden_pF = [stack.apply(x_pD, e) for stack in readers]
                out_pD = down.apply(activate(*hidden_pF), e)
                out_SD.index_add_(0, tokens_r, out_pD[: counts[e]].mul_(weights_r[:, None]))
                hidden += hidden_pF
        ctx.activate, ctx.counts, ctx.tensors = activate, counts, len(flat)
        ctx.save_for_backward(x_SD, tokens_R, weights_R, *flat, *hidden)
        return out_SD

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, tokens_R, weights_R, *rest = ctx.saved_tensors
        flat, hidden = rest[: ctx.tensors], iter(rest[ctx.tensors :])
        grad_flat = [None if tensor is None else torch.empty_like(tensor) for tensor in flat]
        *readers, down = _stacks(flat)
        *grad_readers, grad_down = _stacks(grad_flat)
        grad_x_SD, grad_weights_R = torch.zeros_like(x_SD), torch.empty_like(weights_R)
        split = (tensor.split(ctx.counts) for tensor in (tokens_R, weights_R, grad_weights_R))
        for e, (tokens_r, weights_r, grad_weights_r) in enumerate(zip(*split, strict=True)):
            r = ctx.counts[e]
            if not r:
                for stack in (*grad_readers, grad_down):
                    stack.clear(e)
                continue
            hidden_pF = [next(hidden).detach().requires_grad_() for _ in readers]
            with torch.enable_grad():
                active_pF = ctx.activate(*hidden_pF)
            x_pD, grad_pD = (_select(tensor, tokens_r, len(active_pF)) for tensor in (x_SD, grad_SD))
            # the gradient of the activation but for the row's weight, whose own gradient needs it
            grad_pF = multiply(grad_pD, down.turned_OI[e])
            torch.linalg.vecdot(active_pF[:r].detach(), grad_pF[:r], out=grad_weights_r)
            if down.bias_O is not None:
                grad_weights_r += grad_pD[:r] @ down.bias_O[e]
            grad_pD[:r] *= weights_r[:, None]
            grad_pF[:r] *= weights_r[:, None]
            grad_down.take(active_pF.detach(), grad_pD, e)
            grads_pF = torch.autograd.grad(active_pF, hidden_pF, grad_pF)
            grad_x_pD: Any = None
            for stack, grad_stack, grad_pF in zip(readers, grad_readers, grads_pF, strict=True):
                grad_stack.take(x_pD, grad_pF, e)
                grad_x_pD = multiply(grad_pF, stack.turned_OI[e], added_RO=grad_x_pD)
            grad_x_SD.index_add_(0, tokens_r, grad_x_pD[:r])
        return None, None, grad_x_SD, None, grad_weights_R, *grad_flat


def _select(x_SD: Tensor, tokens_r: Tensor, p: int) -> Tensor:
    """The rows of these tokens, and zeros after them, p in all."""
    r = len(tokens_r)
    if p == r:
        return x_SD.index_select(0, tokens_r)
    x_pD = x_SD.new_empty(p, x_SD.shape[1])
    torch.index_select(x_SD, 0, tokens_r, out=x_pD[:r])
    x_pD[r:] = 0
    return x_pD


class _Stack:
    """A layer's matrices one by one, as views, and its biases; or the gradients of both."""

    def __init__(self, weight_eIO: Tensor, bias_eO: Tensor | None):
        self.weight_IO, self.turned_OI = weight_eIO.unbind(), weight_eIO.mT.unbind()
        self.bias_O = None if bias_eO is None else bias_eO.unbind()

    def apply(self, x_pI: Tensor, e: int) -> Tensor:
        """What expert e gives for its rows."""
        return multiply(x_pI, self.weight_IO[e], None if self.bias_O is None else self.bias_O[e])

    def take(self, x_pI: Tensor, grad_pO: Tensor, e: int) -> None:
        """Write the gradients of expert e."""
        multiply_into(self.weight_IO[e], x_pI, grad_pO)
        if self.bias_O is not None:
            torch.sum(grad_pO, 0, out=self.bias_O[e])

    def clear(self, e: int) -> None:
        """Write zeros for expert e."""
        self.weight_IO[e].zero_()
        if self.bias_O is not None:
            self.bias_O[e].zero_()


def _stacks(flat: Sequence[Any]) -> list[_Stack]:
    return [_Stack(weight, bias) for weight, bias in zip(flat[::2], flat[1::2], strict=True)]


# --- all experts at once ------------------------------------------------------------------------------------------


def run_grouped(x_SD: Tensor, rows: Rows, activate: Activate, inputs: Sequence[Layer], down: Layer) -> Tensor:
    """All experts in one product per layer; widths that the product does not take are filled up with zeros."""
    ends_e = rows.counts_E.cumsum(0).to(torch.int32)
    dtype = x_SD.dtype  # `finish` lives until the backward pass, with all that it names

    def bias(bias_eO: Tensor) -> Tensor:
        return bias_eO.repeat_interleave(rows.counts_E, 0, output_size=rows.tokens_R.shape[0])

    def zero_without_rows(grads: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, *others = grads
        if grad_weight is not None:
            grad_weight = grad_weight.masked_fill((rows.counts_E == 0)[:, None, None], 0)
        return grad_x, grad_weight, *others

    def multiply_rows(x_RI: Tensor, weight_eIO: Tensor) -> Tensor:
        out_RO = functional.grouped_mm(_aligned(x_RI, 1), _aligned(weight_eIO, 2), offs=ends_e)
        if out_RO.grad_fn is not None and _leaves_gradients_unwritten(out_RO.device):
            out_RO.grad_fn.register_hook(zero_without_rows)
        outputs = weight_eIO.shape[2]
        return out_RO if out_RO.shape[1] == outputs else out_RO[:, :outputs]

    def linear(x_RI: Tensor, layer: Layer) -> Tensor:
        out_RO = multiply_rows(x_RI, layer.weight_eIO)
        return out_RO if layer.bias_eO is None else out_RO + bias(layer.bias_eO)

    def finish(*hidden_RF: Tensor) -> Tensor:
        weights_R1 = rows.weights_R.to(dtype)[:, None]
        out_RD = multiply_rows(activate(*hidden_RF) * weights_R1, down.weight_eIO)
        return out_RD if down.bias_eO is None else out_RD + weights_R1 * bias(down.bias_eO)

    x_RD = permute(x_SD, rows)
    hidden_RF = [linear(x_RD, layer) for layer in inputs]
    # the second run ends where the product would begin: only the activation is computed again
    out_RD = checkpoint(finish, *hidden_RF, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    return unpermute(out_RD, rows)


ALIGNED_BYTES = 16
"""Operands of a grouped product begin at multiples of it, and so do their rows (the TMA unit of GPUs asks for it)."""


def _aligned(x: Tensor, dims: int) -> Tensor:
    """x, with zeros at the end of its last dimensions where rows are not aligned; a copy where its start is not."""
    step = ALIGNED_BYTES // x.itemsize
    zeros = [-size % step for size in reversed(x.shape[-dims:])]
    if any(zeros):
        return functional.pad(x, [fill for zeros_after in zeros for fill in (0, zeros_after)])
    return x.clone() if x.storage_offset() % step else x  # a ZeRO stage may lay it into one tensor with others
