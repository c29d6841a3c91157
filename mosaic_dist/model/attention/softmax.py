"""Multi-head, grouped-query and multi-query attention: one implementation over the number of key-value heads.

MHA: Vaswani et al., arXiv 1706.03762. MQA: Shazeer, arXiv 1911.02150. GQA: Ainslie et al., arXiv 2305.13245.
"""

import torch
from torch import Tensor, nn

from mosaic_dist.model.attention.attention import Attention, AttentionMetadata, AttentionModule, RingCache, mean_visible
from mosaic_dist.model.attention.blocks import attend_visible
from mosaic_dist.model.attention.kernel import Kernel
from mosaic_dist.model.linear import LinearKind, PlainLinearKind
from mosaic_dist.model.norm import INNER_NORM_EPS
from mosaic_dist.model.position import Position
from mosaic_dist.spec import Positive, PositiveFloat, SpecError, UnitInterval


class SoftmaxAttention(Attention):
    """What MHA, GQA and MQA have in common.

    `head_dim` is dim / heads unless given. `bias` is that of queries, keys and values, `output_bias` (None: the same)
    of the output. `qk_norm` applies RMSNorm with a gain to each head's queries and keys (Dehghani et al., arXiv
    2302.05442), with `qk_norm_eps` (None: that of the model's norm). `sliding_window`: a token sees only so many
    tokens, itself included. For `attention_sinks`, `logit_softcap` and `kernel` see `kernel.attend`. `linear` is the
    kind of the projections.
    """

    heads: Positive
    head_dim: Positive | None = None
    bias: bool = False
    output_bias: bool | None = None
    qk_norm: bool = False
    qk_norm_eps: PositiveFloat | None = None
    sliding_window: Positive | None = None
    attention_sinks: bool = False
    logit_softcap: PositiveFloat | None = None
    dropout: UnitInterval = 0.0
    kernel: Kernel = "sdpa"
    linear: LinearKind = PlainLinearKind()

    def key_value_heads(self) -> int:
        """G, which divides `heads`."""
        return self.heads

    def head_counts(self) -> tuple[int, int]:
        """Query heads and key-value heads."""
        return self.heads, self.key_value_heads()

    def validate(self) -> None:
        """Heads divide into groups; a soft cap has its kernel."""
        if self.heads % self.key_value_heads():
            raise SpecError("kv_heads", f"{self.key_value_heads()} key-value heads must divide {self.heads} heads")
        if self.logit_softcap is not None and self.kernel == "sdpa":
            raise SpecError(
                "logit_softcap", "PyTorch's fused attention has no soft cap; use kernel 'explicit', or none"
            )

    def build(self, dim: int, position: Position, norm_eps: float = INNER_NORM_EPS) -> "MultiHeadAttention":
        """query [N*H, dim], key and value [G*H, dim], output [dim, N*H]."""
        if self.head_dim is None and dim % self.heads:
            raise SpecError("heads", f"{self.heads} heads must divide the model's width ({dim}), or give head_dim")
        return MultiHeadAttention(self, dim, position, norm_eps)


class MHA(SoftmaxAttention, type="mha"):
    """Every head has keys and values of its own."""


class GQA(SoftmaxAttention, type="gqa"):
    """`kv_heads` key-value heads, each shared by heads / kv_heads query heads."""

    kv_heads: Positive

    def key_value_heads(self) -> int:
        """As given."""
        return self.kv_heads


class MQA(SoftmaxAttention, type="mqa"):
    """One key-value head for all query heads."""

    def key_value_heads(self) -> int:
        """One."""
        return 1


class MultiHeadAttention(AttentionModule):
    """The module of MHA, GQA and MQA: projections, optional QK norm, attention kernel, output projection."""

    def __init__(self, spec: SoftmaxAttention, dim: int, position: Position, norm_eps: float):
        super().__init__()
        self.spec = spec
        self.head_dim = spec.head_dim or dim // spec.heads
        linear = spec.linear.build
        inner, groups = spec.heads * self.head_dim, spec.key_value_heads() * self.head_dim
        self.position = position.for_heads(spec.heads, self.head_dim)
        self.query = linear(dim, inner, bias=spec.bias)
        self.key, self.value = linear(dim, groups, bias=spec.bias), linear(dim, groups, bias=spec.bias)
        output_bias = spec.bias if spec.output_bias is None else spec.output_bias
        self.output = linear(inner, dim, bias=output_bias, residual=True)
        eps = norm_eps if spec.qk_norm_eps is None else spec.qk_norm_eps
        self.query_norm = nn.RMSNorm(self.head_dim, eps=eps) if spec.qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(self.head_dim, eps=eps) if spec.qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.empty(spec.heads)) if spec.attention_sinks else None

    def forward(self, x_BTD: Tensor, metadata: AttentionMetadata, cache: RingCache | None = None) -> Tensor:
        """Attend within [B, T, dim]; with a cache, also to what it holds."""
        q_BTNH, k_BTGH, v_BTGH = (
            layer(x_BTD).unflatten(-1, (-1, self.head_dim)) for layer in (self.query, self.key, self.value)
        )
        q_BTNH = self.position.rotate(self.query_norm(q_BTNH), metadata.positions_BT)
        k_BSGH, v_BSGH = self.position.rotate(self.key_norm(k_BTGH), metadata.positions_BT), v_BTGH
        index_S = metadata.index_T
        if cache is not None:
            index_S, (k_BSGH, v_BSGH) = cache.extend(metadata.index_T, k_BSGH, v_BSGH)
        return self.output(self.exchange(self._score, q_BTNH, k_BSGH, v_BSGH, metadata, index_S).flatten(2))

    def _score(
        self, q_BTNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, metadata: AttentionMetadata, index_S: Tensor, heads: slice
    ) -> Tensor:
        """Scores, softmax and weighted values of the given heads, [B, T, N, H]."""
        out_BNTH = attend_visible(
            q_BTNH.transpose(1, 2),
            k_BSGH.transpose(1, 2),
            v_BSGH.transpose(1, 2),
            metadata,
            index_S=None if index_S is metadata.index_T else index_S,
            sliding_window=self.spec.sliding_window,
            bias=self.position.bias(metadata.positions_BT, metadata.positions_BS[:, index_S], heads),
            sinks_N=None if self.sinks is None else self.sinks[heads],
            logit_softcap=self.spec.logit_softcap,
            dropout=self.spec.dropout if self.training else 0.0,
            kernel=self.spec.kernel,
        )
        return out_BNTH.transpose(1, 2)

    def score_flops(self, seq_len: int) -> float:
        """Two products with every visible key, as wide as the heads."""
        return 4 * mean_visible(seq_len, self.spec.sliding_window) * self.spec.heads * self.head_dim

    def new_cache(self, batch: int, capacity: int) -> RingCache:
        """Keys and values of all tokens, or of the window."""
        return RingCache(min(capacity, self.spec.sliding_window or capacity))
