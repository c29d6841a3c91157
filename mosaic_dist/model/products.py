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


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`functional.linear`: [..., I] -> [..., O]. Float32 results may differ from its own by rounding.

    Gradients of gradients are refused where oneDNN computes: RuntimeError.
    """
    if not _goes_to_onednn(x, weight_OI):
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


def _product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")


def _goes_to_onednn(x: Tensor, weight_OI: Tensor) -> bool:
    is_plain = all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype == torch.float32
        for tensor in (x, weight_OI)
    )
    return (
        is_plain
        and x.dim() > 1
        and x.numel() * len(weight_OI) >= LEAST_MULTIPLICATIONS
        and not torch.compiler.is_compiling()  # the compiler chooses for itself
        and not torch.is_autocast_enabled("cpu")
        and _onednn_is_faster()
    )


@cache
def _onednn_is_faster() -> bool:
    """Whether this is an AMD CPU with AVX-512, and torch has the product."""
    about = Path("/proc/cpuinfo")
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and about.exists()
        and "AuthenticAMD" in about.read_text()
    )
