"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437).

Keys and values of all heads are made from one latent vector per token, so that is all that a cache keeps, beside one
rotary key shared by the heads (decoupled RoPE).
"""

import torch
from torch import Tensor, nn

from mosaic_dist.model.attention.attention import Attention, AttentionModule, RingCache, Sight, mean_visible
from mosaic_dist.model.attention.blocks import attend_in_sight
from mosaic_dist.model.attention.kernel import Kernel
from mosaic_dist.model.linear import Matrix, PlainMatrix
from mosaic_dist.model.norm import INNER_NORM_EPS
from mosaic_dist.model.position import DecoupledRoPE, Position
from mosaic_dist.spec import Fraction, Positive, PositiveFloat, SpecError


class MLA(Attention, type="mla"):
    """`kv_compression_dim` is the width of the latent; queries pass one of `q_compression_dim` where given.

    `head_width` (None: dim / heads) is that of a head's position-free queries and keys, `value_width` (None: the same)
    of its values. With `DecoupledRoPE` as the model's position, that kind's `width` more dimensions carry positions;
    other positions act on the embeddings or scores, as for any attention. Latents pass an RMSNorm of `norm_eps`.
    `score_scale` is a factor on all scores (with YaRN, DeepSeek-V3 sharpens more than the rotary dimensions). `matrix`
    is the kind of all projections.
    """

    heads: Positive
    kv_compression_dim: Positive
    q_compression_dim: Positive | None = None
    head_width: Positive | None = None
    value_width: Positive | None = None
    window: Positive | None = None
    dropout: Fraction = 0.0
    norm_eps: PositiveFloat = 1e-6
    score_scale: PositiveFloat = 1.0
    kernel: Kernel = "sdpa"
    matrix: Matrix = PlainMatrix()

    def head_counts(self) -> tuple[int, int]:
        """See `Attention.head_counts`."""
        return self.heads, self.heads

    def build(self, dim: int, position: Position, norm_eps: float = INNER_NORM_EPS) -> "LatentAttention":
        """See `LatentAttention` for the matrices."""
        if self.head_width is None and dim % self.heads:
            raise SpecError("heads", f"{self.heads} heads must divide the model's width ({dim}), or give head_width")
        return LatentAttention(self, dim, position)


class LatentAttention(AttentionModule):
    """See `MLA`. With C the latent's width, R the rotary width, H and U the widths of a head's keys and values:

    query [N*(H+R), dim or Q], kv_down [C+R, dim], kv_up [N*(H+U), C], output [dim, N*U].
    """

    def __init__(self, spec: MLA, dim: int, position: Position):
        super().__init__()
        self.spec = spec
        self.head_width = spec.head_width or dim // spec.heads
        self.value_width = spec.value_width or self.head_width
        self.rope_width = position.width if isinstance(position, DecoupledRoPE) else 0
        self.position = position.for_heads(spec.heads, self.rope_width or self.head_width)
        query_width = spec.heads * (self.head_width + self.rope_width)
        if spec.q_compression_dim is None:
            self.query = spec.matrix.build(dim, query_width)
        else:
            self.query_down = spec.matrix.build(dim, spec.q_compression_dim)
            self.query_norm = nn.RMSNorm(spec.q_compression_dim, eps=spec.norm_eps)
            self.query = spec.matrix.build(spec.q_compression_dim, query_width)
        self.kv_down = spec.matrix.build(dim, spec.kv_compression_dim + self.rope_width)
        self.kv_norm = nn.RMSNorm(spec.kv_compression_dim, eps=spec.norm_eps)
        self.kv_up = spec.matrix.build(spec.kv_compression_dim, spec.heads * (self.head_width + self.value_width))
        self.output = spec.matrix.build(spec.heads * self.value_width, dim, residual=True)

    def forward(self, x_BTD: Tensor, sight: Sight, cache: RingCache | None = None) -> Tensor:
        """See `AttentionModule.forward`."""
        N, R = self.spec.heads, self.rope_width
        compressed = x_BTD if self.spec.q_compression_dim is None else self.query_norm(self.query_down(x_BTD))
        q_BTNH = self.query(compressed).unflatten(-1, (N, -1))
        q_BTNH = q_BTNH if self.spec.score_scale == 1.0 else q_BTNH * self.spec.score_scale
        latent_BSC, rotary_BSR = self.kv_down(x_BTD).split([self.spec.kv_compression_dim, R], -1)
        latent_BSC = self.kv_norm(latent_BSC)
        if R:
            plain, turned = q_BTNH.split([self.head_width, R], -1)
            q_BTNH = torch.cat([plain, self.position.rotate(turned, sight.positions_BT)], -1)
            rotary_BSR = self.position.rotate(rotary_BSR[:, :, None], sight.positions_BT)[:, :, 0]
        index_S = sight.index_T
        if cache is not None:
            index_S, (latent_BSC, rotary_BSR) = cache.extend(sight.index_T, latent_BSC, rotary_BSR)
        k_BSNH, v_BSNU = self.kv_up(latent_BSC).unflatten(-1, (N, -1)).split([self.head_width, self.value_width], -1)
        if R:
            k_BSNH = torch.cat([k_BSNH, rotary_BSR[:, :, None].expand(-1, -1, N, -1)], -1)
        return self.output(self.exchange(self._score, q_BTNH, k_BSNH, v_BSNU, sight, index_S).flatten(2))

    def _score(
        self, q_BTNH: Tensor, k_BSNH: Tensor, v_BSNU: Tensor, sight: Sight, index_S: Tensor, heads: slice
    ) -> Tensor:
        """See `Score`."""
        out_BNTU = attend_in_sight(
            q_BTNH.transpose(1, 2),
            k_BSNH.transpose(1, 2),
            v_BSNU.transpose(1, 2),
            sight,
            index_S=None if index_S is sight.index_T else index_S,
            window=self.spec.window,
            bias=self.position.bias(sight.positions_BT, sight.positions_BS[:, index_S], heads),
            dropout=self.spec.dropout if self.training else 0.0,
            kernel=self.spec.kernel,
        )
        return out_BNTU.transpose(1, 2)

    def score_flops(self, seq_len: int) -> float:
        """A product with every visible key and one with its value."""
        width = self.head_width + self.rope_width + self.value_width
        return 2 * mean_visible(seq_len, self.spec.window) * self.spec.heads * width

    def new_cache(self, batch: int, capacity: int) -> RingCache:
        """Latents and rotary keys of all tokens, or of the window."""
        return RingCache(min(capacity, self.spec.window or capacity))
