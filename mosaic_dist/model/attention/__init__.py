"""Causal attentions, one kind per file."""

from mosaic_dist.model.attention.attention import Attention, AttentionMetadata, AttentionModule, LocalHeads, Score
from mosaic_dist.model.attention.linear import LinearAttention
from mosaic_dist.model.attention.mla import MLA
from mosaic_dist.model.attention.softmax import GQA, MHA, MQA, SoftmaxAttention

__all__ = [
    "GQA",
    "MHA",
    "MLA",
    "MQA",
    "Attention",
    "AttentionMetadata",
    "AttentionModule",
    "LinearAttention",
    "LocalHeads",
    "Score",
    "SoftmaxAttention",
]
