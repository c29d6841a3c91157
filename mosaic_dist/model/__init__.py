"""The model, on one device. Specs say what it is made of; nothing here knows of processes or clusters."""

from mosaic_dist.model.activation_checkpointing import ActivationCheckpointing, apply_activation_checkpointing
from mosaic_dist.model.attention import (
    GQA,
    MHA,
    MLA,
    MQA,
    Attention,
    AttentionMetadata,
    AttentionModule,
    LinearAttention,
    Score,
)
from mosaic_dist.model.block import Block, BlockKind
from mosaic_dist.model.compilation import check_compiler, compile_layers
from mosaic_dist.model.count import Counts, count_parameters, flops_per_token
from mosaic_dist.model.embedding import Embedding, Factored, Table
from mosaic_dist.model.ffn import FFN, GEGLU, GELU, ClampedSwiGLU, DenseFFN, Experts, SwiGLU
from mosaic_dist.model.head import FactoredOutput, Head, Tied, UnitHead, Untied
from mosaic_dist.model.init import Init, initialize, materialize
from mosaic_dist.model.linear import GroupedLinear, LinearKind, PlainLinearKind
from mosaic_dist.model.loss import Loss
from mosaic_dist.model.moe import (
    LocalDispatcher,
    MixtureOfExperts,
    MoE,
    MoEBase,
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
from mosaic_dist.model.rows import Rows, permute, unpermute
from mosaic_dist.model.ternary import TernaryLinearKind, pack_ternary, ternary, unpack_ternary
from mosaic_dist.model.transformer import LossOutput, Transformer, TransformerModel, make_attention_metadata
from mosaic_dist.model.unit import UnitLinearKind
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
    "ActivationCheckpointing",
    "Attention",
    "AttentionMetadata",
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
    "LinearKind",
    "LinearScaling",
    "Llama3Scaling",
    "LocalDispatcher",
    "Loss",
    "LossOutput",
    "MixtureOfExperts",
    "MoE",
    "MoEBase",
    "MoESwiGLU",
    "MuP",
    "NTKScaling",
    "NoPosition",
    "Norm",
    "NormalizedBlock",
    "PlainLinearKind",
    "Position",
    "RMSNorm",
    "RoPE",
    "Router",
    "Rows",
    "Score",
    "SigmoidTopK",
    "Sinusoidal",
    "SoftmaxTopK",
    "SwiGLU",
    "Table",
    "TernaryLinearKind",
    "Tied",
    "TopKSoftmax",
    "Transformer",
    "TransformerModel",
    "UnitHead",
    "UnitLinearKind",
    "UnitNorm",
    "Untied",
    "YaRN",
    "apply_activation_checkpointing",
    "check_compiler",
    "compile_layers",
    "count_parameters",
    "flops_per_token",
    "initialize",
    "make_attention_metadata",
    "materialize",
    "pack_ternary",
    "permute",
    "ternary",
    "unpack_ternary",
    "unpermute",
]
