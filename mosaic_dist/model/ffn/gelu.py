"""Feed-forward network with GELU, as in GPT-2 (tanh form; Hendrycks and Gimpel, arXiv 1606.08415)."""

from torch import Tensor
from torch.nn import functional

from mosaic_dist.model.ffn.ffn import DenseFFN


class GELU(DenseFFN, type="gelu"):
    """down(gelu(up(x))) of hidden width `hidden_dim`."""

    def activate(self, *hidden: Tensor) -> Tensor:
        """up -> what down sees."""
        (up,) = hidden
        return functional.gelu(up, approximate="tanh")
