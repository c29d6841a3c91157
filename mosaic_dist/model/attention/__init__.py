"""Causal attentions, one kind per file."""

from mosaic_dist.model.attention.attention import Attention
from mosaic_dist.model.attention.mha import MHA

__all__ = ["MHA", "Attention"]
