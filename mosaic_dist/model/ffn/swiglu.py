"""SwiGLU feed-forward network (Shazeer, arXiv 2002.05202)."""

from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.model.ffn.ffn import DenseFFN, LinearFactory


class SwiGLU(DenseFFN, type="swiglu"):
    """down(silu(gate(x)) * up(x)) of hidden width `width`."""

    def build_with(self, dim: int, width: int, linear: LinearFactory) -> nn.Module:
        """gate, up [dim -> width], down [width -> dim]."""
        return SwiGLUNetwork(dim, width, linear)


class SwiGLUNetwork(nn.Module):
    """See `SwiGLU`."""

    def __init__(self, dim: int, width: int, linear: LinearFactory):
        super().__init__()
        self.gate, self.up = linear(dim, width), linear(dim, width)
        self.down = linear(width, dim, residual=True)

    def forward(self, x: Tensor, *groups: object) -> Tensor:
        """[..., D] -> [..., D]; `groups` go to every layer."""
        return self.down(functional.silu(self.gate(x, *groups)) * self.up(x, *groups), *groups)
