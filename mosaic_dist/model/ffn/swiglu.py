"""SwiGLU feed-forward network (Shazeer, arXiv 2002.05202)."""

from torch import Tensor
from torch.nn import functional

from mosaic_dist.model.ffn.ffn import GatedFFN


class SwiGLU(GatedFFN, type="swiglu"):
    """down(silu(gate(x)) * up(x)) of hidden width `hidden_dim`."""

    def activate(self, *hidden: Tensor) -> Tensor:
        """gate, up -> what down sees."""
        gate, up = hidden
        return functional.silu(gate) * up
