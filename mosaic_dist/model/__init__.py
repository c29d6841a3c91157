"""The model, on one device. Specs say what it is made of; nothing here knows of processes or clusters."""

from mosaic_dist.model.attention import MHA, Attention
from mosaic_dist.model.block import Block
from mosaic_dist.model.count import Counts, count_parameters, flops_per_token
from mosaic_dist.model.embedding import Embedding, Factored, Table
from mosaic_dist.model.ffn import FFN, GELU, DenseFFN, SwiGLU
from mosaic_dist.model.head import Head, Tied, Untied
from mosaic_dist.model.init import Init, initialize, materialize
from mosaic_dist.model.linear import GroupedLinear
from mosaic_dist.model.moe import LocalExchange, MixtureOfExperts, MoE
from mosaic_dist.model.norm import LayerNorm, Norm, RMSNorm
from mosaic_dist.model.position import Learned, NoPosition, Position
from mosaic_dist.model.transformer import LossParts, Transformer, TransformerModel

__all__ = [
    "FFN",
    "GELU",
    "MHA",
    "Attention",
    "Block",
    "Counts",
    "DenseFFN",
    "Embedding",
    "Factored",
    "GroupedLinear",
    "Head",
    "Init",
    "LayerNorm",
    "Learned",
    "LocalExchange",
    "LossParts",
    "MixtureOfExperts",
    "MoE",
    "NoPosition",
    "Norm",
    "Position",
    "RMSNorm",
    "SwiGLU",
    "Table",
    "Tied",
    "Transformer",
    "TransformerModel",
    "Untied",
    "count_parameters",
    "flops_per_token",
    "initialize",
    "materialize",
]
