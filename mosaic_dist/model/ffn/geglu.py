"""Gated GELU feed-forward network (GEGLU; Shazeer, arXiv 2002.05202)."""

from torch import Tensor
from torch.nn import functional

from mosaic_dist.model.ffn.ffn import GatedFFN


class GEGLU(GatedFFN, type="geglu"):
    """down(gelu(gate(x)) * up(x)) of hidden width `hidden_dim`, with the tanh form of GELU (as in T5 1.1 and Gemma)."""

    def activate(self, *hidden: Tensor) -> Tensor:
        """gate, up -> what down sees."""
        gate, up = hidden
        return functional.gelu(gate, approximate="tanh") * up
