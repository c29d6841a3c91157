"""Matrix products by the faster of torch's two CPU libraries.

torch gives float32 products to MKL, which does not use AVX-512 on AMD's CPUs; oneDNN does, and is about twice as fast
there. See docs/design.md, "Products on AMD CPUs".
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

LEAST_MULTIPLICATIONS = 2**24
"""Of a product that goes to oneDNN: each new shape costs it about a millisecond, once, which a small one never earns
back."""
LEAST_OF_EXPERTS = 2**22
"""The same of an expert's products, which come in few shapes: see `rounded_rows`."""
LEAST_STEP, STEPS = 32, 16
"""Rows of an expert that go to oneDNN are multiples of a step, which grows so that every octave has at most so many."""


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`functional.linear`: [..., I] -> [..., O]. Float32 results may differ from its own by rounding.

    Gradients of gradients are refused where oneDNN computes: RuntimeError.
    """
    if not _goes_to_onednn(x, weight_OI, x.numel() * len(weight_OI), LEAST_MULTIPLICATIONS):
        return functional.linear(x, weight_OI, bias_O)
    given = (x, weight_OI) if bias_O is None else (x, weight_OI, bias_O)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return _Linear.apply(x, weight_OI, bias_O)
    return _product(x, weight_OI, bias_O)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return _product(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_RO = grad.flatten(0, -2)
        return (
            _product(grad, weight_OI.T) if needs_x else None,
            _product(grad_RO.T, x.flatten(0, -2).T) if needs_weight else None,
            grad_RO.sum(0) if needs_bias else None,
        )


# --- an expert's products: its rows are others in every step --------------------------------------------------------


def rounded_rows(x_SI: Tensor, weight_IO: Tensor, rows: int) -> int:
    """How many rows an expert's products are to have that has `rows` of x: more, where few shapes are to occur."""
    step = max(LEAST_STEP, 1 << (rows - 1).bit_length() >> STEPS.bit_length())
    rounded = -(-rows // step) * step
    goes = _goes_to_onednn(x_SI, weight_IO, rounded * weight_IO.numel(), LEAST_OF_EXPERTS)
    return rounded if goes else rows


def multiply(x_RI: Tensor, weight_IO: Tensor, bias_O: Tensor | None = None, added_RO: Tensor | None = None) -> Tensor:
    """x @ weight, plus a bias or `added_RO` (which may be overwritten) -> [R, O], not to be differentiated."""
    if _goes_to_onednn(x_RI, weight_IO, x_RI.shape[0] * weight_IO.numel(), LEAST_OF_EXPERTS):
        if added_RO is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x_RI, added_RO, weight_IO.T, None, "add")
        return _product(x_RI, weight_IO.T, bias_O)
    if added_RO is not None:
        return added_RO.addmm_(x_RI, weight_IO)
    return x_RI @ weight_IO if bias_O is None else torch.addmm(bias_O, x_RI, weight_IO)


def multiply_into(out_IO: Tensor, x_RI: Tensor, grad_RO: Tensor) -> None:
    """out = x^T @ grad, not to be differentiated."""
    if _goes_to_onednn(x_RI, grad_RO, x_RI.numel() * grad_RO.shape[1], LEAST_OF_EXPERTS):
        out_IO.copy_(_product(x_RI.T, grad_RO.T))
    else:
        torch.mm(x_RI.T, grad_RO, out=out_IO)


# --- which library ------------------------------------------------------------------------------------------------


def _product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")


def _goes_to_onednn(x: Tensor, weight: Tensor, multiplications: int, least: int) -> bool:
    is_plain = all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype == torch.float32
        for tensor in (x, weight)
    )
    return (
        is_plain
        and x.dim() > 1
        and multiplications >= least
        and not torch.compiler.is_compiling()  # the compiler chooses for itself
        and not torch.is_autocast_enabled("cpu")
        and _onednn_is_faster()
    )


@cache
def _onednn_is_faster() -> bool:
    """Whether this is an AMD CPU with AVX-512, and torch has the product."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and is_avx512_cpu_with("AuthenticAMD")


@cache
def is_avx512_cpu_with(word: str) -> bool:
    """Whether torch computes with AVX-512 and oneDNN here, on a CPU that Linux describes by this word among others."""
    about = Path("/proc/cpuinfo")
    able = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return able and about.exists() and word in about.read_text().split()
