"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437).

Keys and values of all heads are made from one latent vector per token, so that is all that a cache keeps, beside one
rotary key shared by the heads (decoupled RoPE).
"""

import torch
from torch import Tensor, nn

from mosaic_dist.model.attention.attention import Attention, AttentionMetadata, AttentionModule, RingCache, mean_visible
from mosaic_dist.model.attention.blocks import attend_visible
from mosaic_dist.model.attention.kernel import Kernel
from mosaic_dist.model.linear import LinearKind, PlainLinearKind
from mosaic_dist.model.norm import INNER_NORM_EPS
from mosaic_dist.model.position import DecoupledRoPE, Position
from mosaic_dist.spec import Positive, PositiveFloat, SpecError, UnitInterval


class MLA(Attention, type="mla"):
    """`kv_compression_dim` is the width of the latent; queries pass one of `q_compression_dim` where given.

    `head_dim` (None: dim / heads) is that of a head's position-free queries and keys, `v_head_dim` (None: the same)
    of its values. With `DecoupledRoPE` as the model's position, that kind's `rope_head_dim` more dimensions carry
    positions; other positions act on the embeddings or scores, as for any attention. Latents pass an RMSNorm of
    `norm_eps`. `softmax_scale` is a factor on all scores (with YaRN, DeepSeek-V3 sharpens more than the rotary
    dimensions). `linear` is the kind of all projections.
    """

    heads: Positive
    kv_compression_dim: Positive
    q_compression_dim: Positive | None = None
    head_dim: Positive | None = None
    v_head_dim: Positive | None = None
    sliding_window: Positive | None = None
    dropout: UnitInterval = 0.0
    norm_eps: PositiveFloat = 1e-6
    softmax_scale: PositiveFloat = 1.0
    kernel: Kernel = "sdpa"
    linear: LinearKind = PlainLinearKind()

    def head_counts(self) -> tuple[int, int]:
        """Query heads and key-value heads, both `heads`."""
        return self.heads, self.heads

    def build(self, dim: int, position: Position, norm_eps: float = INNER_NORM_EPS) -> "LatentAttention":
        """Build the module with its projections for a model `dim` wide."""
        if self.head_dim is None and dim % self.heads:
            raise SpecError("heads", f"{self.heads} heads must divide the model's width ({dim}), or give head_dim")
        return LatentAttention(self, dim, position)


class LatentAttention(AttentionModule):
    """The module of `MLA`. With C the latent's width, R the rotary width, H and U the widths of a head's keys and
    values:

    query [N*(H+R), dim or Q], kv_down [C+R, dim], kv_up [N*(H+U), C], output [dim, N*U].
    """

    def __init__(self, spec: MLA, dim: int, position: Position):
        super().__init__()
        self.spec = spec
        self.head_dim = spec.head_dim or dim // spec.heads
        self.v_head_dim = spec.v_head_dim or self.head_dim
        self.rope_head_dim = position.rope_head_dim if isinstance(position, DecoupledRoPE) else 0
        self.position = position.for_heads(spec.heads, self.rope_head_dim or self.head_dim)
        query_width = spec.heads * (self.head_dim + self.rope_head_dim)
        if spec.q_compression_dim is None:
            self.query = spec.linear.build(dim, query_width)
        else:
            self.query_down = spec.linear.build(dim, spec.q_compression_dim)
            self.query_norm = nn.RMSNorm(spec.q_compression_dim, eps=spec.norm_eps)
            self.query = spec.linear.build(spec.q_compression_dim, query_width)
        self.kv_down = spec.linear.build(dim, spec.kv_compression_dim + self.rope_head_dim)
        self.kv_norm = nn.RMSNorm(spec.kv_compression_dim, eps=spec.norm_eps)
        self.kv_up = spec.linear.build(spec.kv_compression_dim, spec.heads * (self.head_dim + self.v_head_dim))
        self.output = spec.linear.build(spec.heads * self.v_head_dim, dim, residual=True)

    def forward(self, x_BTD: Tensor, metadata: AttentionMetadata, cache: RingCache | None = None) -> Tensor:
        """Attend within [B, T, dim]; with a cache, also to what it holds."""
        N, R = self.spec.heads, self.rope_head_dim
        compressed = x_BTD if self.spec.q_compression_dim is None else self.query_norm(self.query_down(x_BTD))
        q_BTNH = self.query(compressed).unflatten(-1, (N, -1))
        q_BTNH = q_BTNH if self.spec.softmax_scale == 1.0 else q_BTNH * self.spec.softmax_scale
        latent_BSC, rotary_BSR = self.kv_down(x_BTD).split([self.spec.kv_compression_dim, R], -1)
        latent_BSC = self.kv_norm(latent_BSC)
        if R:
            plain, turned = q_BTNH.split([self.head_dim, R], -1)
            q_BTNH = torch.cat([plain, self.position.rotate(turned, metadata.positions_BT)], -1)
            rotary_BSR = self.position.rotate(rotary_BSR[:, :, None], metadata.positions_BT)[:, :, 0]
        index_S = metadata.index_T
        if cache is not None:
            index_S, (latent_BSC, rotary_BSR) = cache.extend(metadata.index_T, latent_BSC, rotary_BSR)
        k_BSNH, v_BSNU = self.kv_up(latent_BSC).unflatten(-1, (N, -1)).split([self.head_dim, self.v_head_dim], -1)
        if R:
            k_BSNH = torch.cat([k_BSNH, rotary_BSR[:, :, None].expand(-1, -1, N, -1)], -1)
        return self.output(self.exchange(self._score, q_BTNH, k_BSNH, v_BSNU, metadata, index_S).flatten(2))

    def _score(
        self, q_BTNH: Tensor, k_BSNH: Tensor, v_BSNU: Tensor, metadata: AttentionMetadata, index_S: Tensor, heads: slice
    ) -> Tensor:
        """Scores, softmax and weighted values of the given heads, [B, T, N, U]."""
        out_BNTU = attend_visible(
            q_BTNH.transpose(1, 2),
            k_BSNH.transpose(1, 2),
            v_BSNU.transpose(1, 2),
            metadata,
            index_S=None if index_S is metadata.index_T else index_S,
            sliding_window=self.spec.sliding_window,
            bias=self.position.bias(metadata.positions_BT, metadata.positions_BS[:, index_S], heads),
            dropout=self.spec.dropout if self.training else 0.0,
            kernel=self.spec.kernel,
        )
        return out_BNTU.transpose(1, 2)

    def score_flops(self, seq_len: int) -> float:
        """A product with every visible key and one with its value."""
        width = self.head_dim + self.rope_head_dim + self.v_head_dim
        return 2 * mean_visible(seq_len, self.spec.sliding_window) * self.spec.heads * width

    def new_cache(self, batch: int, capacity: int) -> RingCache:
        """Latents and rotary keys of all tokens, or of the window."""
        return RingCache(min(capacity, self.spec.sliding_window or capacity))
