"""Dense feed-forward networks, one kind per file."""

from mosaic_dist.model.ffn.clamped_swiglu import ClampedSwiGLU
from mosaic_dist.model.ffn.ffn import FFN, AuxOutputs, DenseFFN, Experts
from mosaic_dist.model.ffn.geglu import GEGLU
from mosaic_dist.model.ffn.gelu import GELU
from mosaic_dist.model.ffn.swiglu import SwiGLU

__all__ = ["FFN", "GEGLU", "GELU", "AuxOutputs", "ClampedSwiGLU", "DenseFFN", "Experts", "SwiGLU"]
