"""BitLinear: matrix layers with ternary weights and 8-bit activations (BitNet b1.58; Ma et al., arXiv 2402.17764).

The float weights are trained; each product sees them as {-1, 0, 1} times one scale per matrix, and each of its input
rows as int8 times one scale per row. Both roundings pass their gradient straight through (Bengio et al., arXiv
1308.3432).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mosaic_dist.model.linear import GroupedLinear, Linear, LinearKind

SMALLEST_SCALE = 1e-5
"""Floor of an absolute mean or maximum, as in BitNet's reference code: a matrix or row of zeros stays zero."""

NORM_EPS = 1e-6

WEIGHTS_PER_BYTE = 5
"""3 ** 5 = 243 fit in a byte, which makes 1.6 bits per weight; the information in a ternary value is 1.58 bits."""


class TernaryLinearKind(LinearKind, type="ternary"):
    """Weights rounded to three values, inputs normalised and rounded to int8. Biases stay as they are.

    Inputs pass an RMSNorm without gain first, inside the layer, as in BitNet's reference code ("The Era of 1-bit LLMs:
    Training Tips, Code and FAQ"): the rows are then of one size, whatever feeds the layer. The rounded
    copies of the weights live until the backward pass, beside the weights; activation checkpointing drops them.
    """

    def build(self, inputs: int, outputs: int, *, bias: bool = False, residual: bool = False) -> Linear:
        """A linear layer with ternary weights and 8-bit inputs: weight [outputs, inputs]."""
        return TernaryLinear(inputs, outputs, bias=bias, residual=residual)

    def build_stack(
        self, experts: int, inputs: int, outputs: int, *, bias: bool = False, residual: bool = False
    ) -> GroupedLinear:
        """One ternary matrix per expert: weight [experts, inputs, outputs]."""
        return TernaryGroupedLinear(experts, inputs, outputs, bias=bias, residual=residual)


class TernaryLinear(Linear):
    """`Linear` over rounded inputs and weights."""

    def transform_input(self, x: Tensor) -> Tensor:
        """Inputs rounded to 8 bits, one scale per token."""
        return round_rows(x)

    def transform_weight(self) -> Tensor:
        """The weight as {-1, 0, 1} times one scale, with gradients straight through."""
        return round_weight(self.weight)


class TernaryGroupedLinear(GroupedLinear):
    """`GroupedLinear` over rounded inputs and weights, with a scale per expert: which others are here plays no part."""

    def transform_input(self, x_RI: Tensor) -> Tensor:
        """Inputs rounded to 8 bits, one scale per row."""
        return round_rows(x_RI)

    def transform_weight(self) -> Tensor:
        """The weights as {-1, 0, 1} times one scale per expert, with gradients straight through."""
        return round_weight(self.weight)


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., a, b] -> (values [..., a, b] int8 in {-1, 0, 1}, scale [...] float32), one scale per matrix.

    The scale is the mean of |w| and the values are RoundClip(w / scale, -1, 1) (equations 1 to 3 of the paper), which
    is the sign wherever |w| is more than half of the scale.
    """
    scale = weight.detach().abs().mean((-2, -1), dtype=torch.float32).clamp(min=SMALLEST_SCALE)
    half = 0.5 * scale[..., None, None]
    return (weight > half).to(torch.int8) - (weight < -half).to(torch.int8), scale


def transform_weight(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What the products see: values [..., a, b] times scale [...], rounded once to `dtype`."""
    return (values * scale[..., None, None]).to(dtype)


def round_weight(weight: Tensor) -> Tensor:
    """The effective weight, of three values per matrix; its gradient goes to `weight` as it is."""
    return StraightThrough.apply(transform_weight(*ternary(weight), weight.dtype), weight)


def round_rows(x: Tensor) -> Tensor:
    """Each row [..., inputs] normalised (RMSNorm without gain), then rounded to 127 steps of its largest |x|.

    Computed in float32, returned in the dtype of `x`. The rounding passes its gradient through; the norm has its own.
    """
    normed = functional.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
    step = normed.detach().abs().amax(-1, keepdim=True).clamp(min=SMALLEST_SCALE) / 127
    return StraightThrough.apply((normed.detach() / step).round() * step, normed).to(x.dtype)


class StraightThrough(torch.autograd.Function):
    """`rounded` as it is, bit for bit, with the gradient of `exact`; `exact + (rounded - exact)` would round again."""

    @staticmethod
    def forward(ctx: Any, rounded: Tensor, exact: Tensor) -> Tensor:
        """Both of the same shape and dtype -> rounded."""
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """All of it to `exact`."""
        return None, grad


# --- five values in a byte ----------------------------------------------------------------------------------------


def pack_ternary(values: Tensor) -> Tensor:
    """int8 values in {-1, 0, 1} of any shape, flattened -> uint8 [ceil(n / 5)]: base-3 digits, the first value lowest.

    Raises ValueError where another value is found.
    """
    if values.numel() and not -1 <= values.min() <= values.max() <= 1:
        raise ValueError(f"values from {values.min()} to {values.max()} are not ternary: only -1, 0, 1 can be packed")
    flat = functional.pad(values.flatten(), (0, -values.numel() % WEIGHTS_PER_BYTE))
    digits = (flat.view(-1, WEIGHTS_PER_BYTE) + 1).to(torch.uint8)
    return (digits * _powers(values.device)).sum(-1, dtype=torch.uint8)


def unpack_ternary(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse: uint8 [ceil(n / 5)] -> int8 values of `shape`. Raises ValueError for bytes that no packing gives."""
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (math.ceil(count / WEIGHTS_PER_BYTE),):
        raise ValueError(f"{packed.dtype} {list(packed.shape)} is not a packing of {count} ternary values")
    if packed.numel() and packed.max() >= 3**WEIGHTS_PER_BYTE:
        raise ValueError(
            f"byte {packed.max()} is not a packing of ternary values: {3**WEIGHTS_PER_BYTE - 1} is the most"
        )
    digits = packed[:, None] // _powers(packed.device) % 3
    return (digits.to(torch.int8) - 1).flatten()[:count].view(*shape)


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([3**i for i in range(WEIGHTS_PER_BYTE)], dtype=torch.uint8, device=device)
