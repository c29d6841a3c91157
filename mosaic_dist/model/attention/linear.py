"""Linear attention (Katharopoulos et al., arXiv 2006.16236): a feature map instead of the softmax.

Written in chunks: inside a chunk as attention, between chunks through a state that sums up what went before. So memory
is linear in T, and generation is a recurrence with a state of fixed size.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from mosaic_dist.model.attention.attention import Attention, AttentionMetadata, AttentionModule
from mosaic_dist.model.linear import LinearKind, PlainLinearKind
from mosaic_dist.model.norm import INNER_NORM_EPS
from mosaic_dist.model.position import Position
from mosaic_dist.spec import Positive, SpecError


class LinearAttention(Attention, type="linear"):
    """out_t = phi(q_t) S_t / phi(q_t) z_t with S_t = sum_s phi(k_s) v_s, z_t = sum_s phi(k_s), phi = elu + 1.

    `chunk` tokens are computed at once. Positions may rotate queries and keys before the feature map. `linear` is the
    kind of the projections.
    """

    heads: Positive
    bias: bool = False
    chunk: Positive = 64
    linear: LinearKind = PlainLinearKind()

    def head_counts(self) -> tuple[int, int]:
        """Query heads and key-value heads, both `heads`."""
        return self.heads, self.heads

    def build(self, dim: int, position: Position, norm_eps: float = INNER_NORM_EPS) -> "ChunkedLinearAttention":
        """query, key, value, output [dim, dim]."""
        if dim % self.heads:
            raise SpecError("heads", f"{self.heads} heads must divide the model's width ({dim})")
        return ChunkedLinearAttention(self, dim, position)


class LinearState:
    """What linear attention keeps of the past: S [B, N, H, H] and z [B, N, H], and whose document they belong to."""

    def __init__(self) -> None:
        self.sums: tuple[Tensor, Tensor] | None = None
        self.document_B: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return 0 if self.sums is None else sum(tensor.nbytes for tensor in self.sums)


class ChunkedLinearAttention(AttentionModule):
    """Linear attention computed chunk by chunk, with a running state of keys and values."""

    def __init__(self, spec: LinearAttention, dim: int, position: Position):
        super().__init__()
        self.spec = spec
        self.position = position.for_heads(spec.heads, dim // spec.heads)
        self.query, self.key, self.value = (spec.linear.build(dim, dim, bias=spec.bias) for _ in range(3))
        self.output = spec.linear.build(dim, dim, bias=spec.bias, residual=True)

    def forward(self, x_BTD: Tensor, metadata: AttentionMetadata, cache: LinearState | None = None) -> Tensor:
        """Attend within [B, T, dim]; with a cache, its state comes first."""
        q, k, v_BTNH = (
            layer(x_BTD).unflatten(-1, (self.spec.heads, -1)) for layer in (self.query, self.key, self.value)
        )
        q_BTNH, k_BTNH = (self.position.rotate(x, metadata.positions_BT) for x in (q, k))
        score = partial(self._score, cache if cache is not None else LinearState())
        return self.output(self.exchange(score, q_BTNH, k_BTNH, v_BTNH, metadata, metadata.index_T).flatten(2))

    def _score(
        self,
        state: LinearState,
        q_BTNH: Tensor,
        k_BTNH: Tensor,
        v_BTNH: Tensor,
        metadata: AttentionMetadata,
        index_T: Tensor,
        heads: slice,
    ) -> Tensor:
        """Attention of the given heads; the state carried forward stands for all earlier keys."""
        features = (functional.elu(x) + 1 for x in (q_BTNH, k_BTNH))
        q_BNTH, k_BNTH, v_BNTH = (x.float().transpose(1, 2) for x in (*features, v_BTNH))
        documents_BT = metadata.documents_BT
        if documents_BT is None:
            documents_BT = metadata.index_T.new_zeros(1, metadata.index_T.shape[0])
        pieces = [x.split(self.spec.chunk, 2) for x in (q_BNTH, k_BNTH, v_BNTH)]
        documents = documents_BT.expand(q_BTNH.shape[0], -1).split(self.spec.chunk, 1)
        chunks = [self._chunk(q, k, v, d, state) for q, k, v, d in zip(*pieces, documents, strict=True)]
        return torch.cat(chunks, 2).transpose(1, 2).to(q_BTNH.dtype)

    def _chunk(
        self, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, documents_BT: Tensor, state: LinearState
    ) -> Tensor:
        """One chunk, which also brings the state forward. Documents do not see each other."""
        same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
        weights = (q_BNTH @ k_BNTH.transpose(-2, -1)) * (same_BTT.tril()[:, None])
        numerator, denominator = weights @ v_BNTH, weights.sum(-1, keepdim=True)
        last_B = documents_BT[:, -1]
        ends_BT = (documents_BT == last_B[:, None])[:, None, :, None].to(k_BNTH.dtype)
        kept = k_BNTH * ends_BT  # only the last document of the chunk can go on
        sums = kept.transpose(-2, -1) @ v_BNTH, kept.sum(2)
        if state.sums is not None:
            S_BNHH, z_BNH = state.sums
            assert state.document_B is not None, "sums and their document come together"
            goes_on_BT = (documents_BT == state.document_B[:, None])[:, None, :, None]
            numerator = numerator + goes_on_BT * (q_BNTH @ S_BNHH)
            denominator = denominator + goes_on_BT * (q_BNTH @ z_BNH[..., None])
            still_B = (last_B == state.document_B).to(k_BNTH.dtype)
            sums = sums[0] + still_B[:, None, None, None] * S_BNHH, sums[1] + still_B[:, None, None] * z_BNH
        state.sums, state.document_B = sums, last_B
        return numerator / (denominator + 1e-6)

    def score_flops(self, seq_len: int) -> float:
        """Half a chunk of scores, and the state once read and once written."""
        inner = self.query.out_features
        return 2 * self.spec.chunk * inner + 4 * inner * inner / self.spec.heads

    def new_cache(self, batch: int, capacity: int) -> LinearState:
        """A state whose size does not depend on the capacity."""
        return LinearState()
