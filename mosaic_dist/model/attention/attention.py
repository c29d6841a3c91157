"""What every kind of attention is given: which tokens it may see, and what it keeps of those that went before."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_dist.model.attention.documents import Cuts, cut_documents
from mosaic_dist.model.norm import INNER_NORM_EPS
from mosaic_dist.model.position import Position
from mosaic_dist.spec import Spec


class Attention(Spec):
    """Family of causal attentions."""

    def build(self, dim: int, position: Position, norm_eps: float = INNER_NORM_EPS) -> "AttentionModule":
        """Module mapping [B, T, dim] to [B, T, dim], where a token sees itself and what came before.

        `norm_eps` is the epsilon of the model's norms, for norms inside that do not state their own.
        """
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of attention")

    def head_counts(self) -> tuple[int, int] | None:
        """Query and key-value heads, of a kind whose heads may be apart: its module gives them to its `exchange`."""
        return None


@dataclasses.dataclass
class AttentionMetadata:
    """The tokens of one forward pass, the same for all layers.

    `index_T` numbers the T tokens at hand from the beginning of the sequence; all S tokens that there are, cached ones
    included, have `positions_BS` and, where a sequence holds several documents, `documents_BS`. A token sees the tokens
    of its own document with its own index or a lower one. B is 1 where all sequences are alike.
    """

    index_T: Tensor
    positions_BS: Tensor
    documents_BS: Tensor | None = None
    _cuts: Cuts | None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def positions_BT(self) -> Tensor:
        """Positions of the tokens at hand."""
        return self.positions_BS[:, self.index_T]

    @property
    def documents_BT(self) -> Tensor | None:
        """Documents of the tokens at hand."""
        return None if self.documents_BS is None else self.documents_BS[:, self.index_T]

    def visible(self, index_S: Tensor, sliding_window: int | None = None) -> Tensor:
        """Which of the keys with these indexes each token sees, bool [B, 1, T, S]; at most the last `sliding_window`
        ones.
        """
        index_T1 = self.index_T[:, None]
        seen_TS = index_T1 >= index_S  # compared, not subtracted: differences of long sequences would take gigabytes
        if sliding_window is not None:
            seen_TS &= index_T1 - sliding_window < index_S
        if self.documents_BS is None:
            return seen_TS[None, None]
        same_BTS = self.documents_BS[:, self.index_T, None] == self.documents_BS[:, None, index_S]
        return (seen_TS & same_BTS)[:, None]

    def cuts(self, sequences: int) -> Cuts:
        """The documents of so many sequences of the tokens at hand; found once, for all layers."""
        assert self.documents_BT is not None, "there are documents"
        if self._cuts is None:
            self._cuts = cut_documents(self.documents_BT.expand(sequences, -1))
        return self._cuts


Score = Callable[[Tensor, Tensor, Tensor, AttentionMetadata, Tensor, slice], Tensor]
"""(queries [B, T, n, H], keys [B, S, g, H], values [B, S, g, U], metadata, index_S of the keys, heads) -> [B, T, n, U].

`heads` are the n heads among all that the attention has; n is a multiple of g.
"""


class LocalHeads:
    """The seam between projections and scores: all heads are here. Other exchanges keep this interface."""

    def __call__(
        self, score: Score, q_BTNH: Tensor, k_BSGH: Tensor, v_BSGU: Tensor, metadata: AttentionMetadata, index_S: Tensor
    ) -> Tensor:
        """What `score` gives for all heads of the tokens at hand, [B, T, N, U]."""
        return score(q_BTNH, k_BSGH, v_BSGU, metadata, index_S, slice(None))


class AttentionModule(nn.Module):
    """Base of attention modules."""

    def __init__(self) -> None:
        super().__init__()
        self.exchange: Any = LocalHeads()

    def forward(self, x_BTD: Tensor, metadata: AttentionMetadata, cache: Any = None) -> Tensor:
        """x_BTD -> [B, T, D]. With a cache, the tokens at hand follow those in it, and join them."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def score_flops(self, seq_len: int) -> float:
        """Operations per token of a forward pass that are not products with weights: scores, and sums of values."""
        raise TypeError(f"{type(self).__name__} does not tell its operations")

    def new_cache(self, batch: int, capacity: int) -> Any:
        """An empty cache for `batch` sequences of up to `capacity` tokens; storage is made at first use."""
        return RingCache(capacity)


def mean_visible(seq_len: int, sliding_window: int | None) -> float:
    """Keys that a token sees on average, counted as half a square (and a band where there is a window)."""
    if sliding_window is None or sliding_window >= seq_len:
        return seq_len / 2
    return sliding_window - sliding_window**2 / (2 * seq_len)


class RingCache:
    """Tensors [B, S, ...] of past tokens: the last `slots` of them, the oldest overwritten first."""

    def __init__(self, slots: int):
        self.slots = slots
        self.index_S = torch.empty(0, dtype=torch.int64)
        self._store: list[Tensor] = []

    def extend(self, index_T: Tensor, *new_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Add tokens by index; returns the indexes and tensors of what was there and the new ones, in any order."""
        if not self._store:
            self._store = [new.new_zeros(new.shape[0], self.slots, *new.shape[2:]) for new in new_BT]
            self.index_S = index_T.new_full((self.slots,), -1)
        there_S = (self.index_S >= 0).nonzero().flatten()
        index_S = torch.cat([self.index_S[there_S], index_T])
        whole = [torch.cat([old[:, there_S], new], 1) for old, new in zip(self._store, new_BT, strict=True)]
        kept_T = index_T[-self.slots :]
        slot_T = kept_T % self.slots
        self.index_S[slot_T] = kept_T
        for old, new in zip(self._store, new_BT, strict=True):
            old[:, slot_T] = new[:, -self.slots :]
        return index_S, whole

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(tensor.nbytes for tensor in self._store)
