"""Gated GELU feed-forward network (GEGLU; Shazeer, arXiv 2002.05202)."""

from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.model.ffn.ffn import DenseFFN, LinearFactory


class GEGLU(DenseFFN, type="geglu"):
    """down(gelu(gate(x)) * up(x)) of hidden width `width`, with the tanh form of GELU (as in T5 1.1 and Gemma)."""

    def build_with(self, dim: int, width: int, linear: LinearFactory) -> nn.Module:
        """gate, up [dim -> width], down [width -> dim]."""
        return GEGLUNetwork(dim, width, linear)


class GEGLUNetwork(nn.Module):
    """See `GEGLU`."""

    def __init__(self, dim: int, width: int, linear: LinearFactory):
        super().__init__()
        self.gate, self.up = linear(dim, width), linear(dim, width)
        self.down = linear(width, dim, residual=True)

    def forward(self, x: Tensor, *groups: object) -> Tensor:
        """[..., D] -> [..., D]; `groups` go to every layer."""
        gate = functional.gelu(self.gate(x, *groups), approximate="tanh")
        return self.down(gate * self.up(x, *groups), *groups)
