"""Feed-forward network with GELU, as in GPT-2 (tanh form; Hendrycks and Gimpel, arXiv 1606.08415)."""

from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.model.ffn.ffn import DenseFFN, LinearFactory


class GELU(DenseFFN, type="gelu"):
    """down(gelu(up(x))) of hidden width `width`."""

    def build_with(self, dim: int, width: int, linear: LinearFactory) -> nn.Module:
        """up [dim -> width], down [width -> dim]."""
        return GELUNetwork(dim, width, linear)


class GELUNetwork(nn.Module):
    """See `GELU`."""

    def __init__(self, dim: int, width: int, linear: LinearFactory):
        super().__init__()
        self.up, self.down = linear(dim, width), linear(width, dim, residual=True)

    def forward(self, x: Tensor, *groups: object) -> Tensor:
        """[..., D] -> [..., D]; `groups` go to every layer."""
        return self.down(functional.gelu(self.up(x, *groups), approximate="tanh"), *groups)
