"""Dense feed-forward networks, one kind per file."""

from mosaic_dist.model.ffn.ffn import FFN, DenseFFN, Extras
from mosaic_dist.model.ffn.gelu import GELU
from mosaic_dist.model.ffn.swiglu import SwiGLU

__all__ = ["FFN", "GELU", "DenseFFN", "Extras", "SwiGLU"]
