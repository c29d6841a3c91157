"""The model, on one device. Specs say what it is made of; nothing here knows of processes or clusters."""

from mosaic_dist.model.attention import (
    GQA,
    MHA,
    MLA,
    MQA,
    Attention,
    AttentionModule,
    LinearAttention,
    Score,
    Sight,
)
from mosaic_dist.model.block import Block, BlockKind
from mosaic_dist.model.compilation import check_compiler, compile_blocks
from mosaic_dist.model.count import Counts, count_parameters, flops_per_token
from mosaic_dist.model.embedding import Embedding, Factored, Table
from mosaic_dist.model.ffn import FFN, GEGLU, GELU, ClampedSwiGLU, DenseFFN, Experts, SwiGLU
from mosaic_dist.model.head import FactoredOutput, Head, Tied, UnitHead, Untied
from mosaic_dist.model.init import Init, initialize, materialize
from mosaic_dist.model.linear import GroupedLinear, Matrix, PlainMatrix
from mosaic_dist.model.loss import Loss
from mosaic_dist.model.moe import (
    LocalExchange,
    Mixture,
    MixtureOfExperts,
    MoE,
    MoESwiGLU,
    Router,
    SigmoidTopK,
    SoftmaxTopK,
    TopKSoftmax,
)
from mosaic_dist.model.ngpt import NormalizedBlock
from mosaic_dist.model.norm import LayerNorm, Norm, RMSNorm, UnitNorm
from mosaic_dist.model.position import (
    ALiBi,
    DecoupledRoPE,
    Learned,
    LinearScaling,
    Llama3Scaling,
    NoPosition,
    NTKScaling,
    Position,
    RoPE,
    Sinusoidal,
    YaRN,
)
from mosaic_dist.model.recompute import Recompute, apply_recompute
from mosaic_dist.model.rows import Rows, gather, spread
from mosaic_dist.model.ternary import TernaryMatrix, pack_ternary, ternary, unpack_ternary
from mosaic_dist.model.transformer import LossParts, Transformer, TransformerModel, make_sight
from mosaic_dist.model.unit import UnitMatrix
from mosaic_dist.model.width import Factors, MuP

__all__ = [
    "FFN",
    "GEGLU",
    "GELU",
    "GQA",
    "MHA",
    "MLA",
    "MQA",
    "ALiBi",
    "Attention",
    "AttentionModule",
    "Block",
    "BlockKind",
    "ClampedSwiGLU",
    "Counts",
    "DecoupledRoPE",
    "DenseFFN",
    "Embedding",
    "Experts",
    "Factored",
    "FactoredOutput",
    "Factors",
    "GroupedLinear",
    "Head",
    "Init",
    "LayerNorm",
    "Learned",
    "LinearAttention",
    "LinearScaling",
    "Llama3Scaling",
    "LocalExchange",
    "Loss",
    "LossParts",
    "Matrix",
    "Mixture",
    "MixtureOfExperts",
    "MoE",
    "MoESwiGLU",
    "MuP",
    "NTKScaling",
    "NoPosition",
    "Norm",
    "NormalizedBlock",
    "PlainMatrix",
    "Position",
    "RMSNorm",
    "Recompute",
    "RoPE",
    "Router",
    "Rows",
    "Score",
    "Sight",
    "SigmoidTopK",
    "Sinusoidal",
    "SoftmaxTopK",
    "SwiGLU",
    "Table",
    "TernaryMatrix",
    "Tied",
    "TopKSoftmax",
    "Transformer",
    "TransformerModel",
    "UnitHead",
    "UnitMatrix",
    "UnitNorm",
    "Untied",
    "YaRN",
    "apply_recompute",
    "check_compiler",
    "compile_blocks",
    "count_parameters",
    "flops_per_token",
    "gather",
    "initialize",
    "make_sight",
    "materialize",
    "pack_ternary",
    "spread",
    "ternary",
    "unpack_ternary",
]
