"""Multi-head attention (Vaswani et al., arXiv 1706.03762), causal."""

from typing import Literal

from torch import Tensor, nn

from mosaic_dist.model.attention.attention import KERNELS, Attention
from mosaic_dist.model.linear import Linear
from mosaic_dist.spec import Fraction, Positive, SpecError


class MHA(Attention, type="mha"):
    """Every head has its own queries, keys and values of width `dim / heads`.

    `kernel` chooses PyTorch's fused attention ("sdpa") or the mask and scores written out ("explicit").
    """

    heads: Positive
    bias: bool = False
    dropout: Fraction = 0.0
    kernel: Literal["sdpa", "explicit"] = "sdpa"

    def build(self, dim: int) -> nn.Module:
        """query, key, value, output [dim, dim]."""
        if dim % self.heads:
            raise SpecError("heads", f"{self.heads} heads must divide the model's width ({dim})")
        return MultiHeadAttention(self, dim)


class MultiHeadAttention(nn.Module):
    """See `MHA`."""

    def __init__(self, spec: MHA, dim: int):
        super().__init__()
        self.spec = spec
        self.query, self.key, self.value = (Linear(dim, dim, bias=spec.bias) for _ in range(3))
        self.output = Linear(dim, dim, bias=spec.bias, residual=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD -> [B, T, D]."""
        q, k, v = (
            layer(x_BTD).unflatten(-1, (self.spec.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        dropout = self.spec.dropout if self.training else 0.0
        out_BNTH = KERNELS[self.spec.kernel](q, k, v, dropout)
        return self.output(out_BNTH.transpose(1, 2).flatten(2))
