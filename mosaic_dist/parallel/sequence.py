"""Sequence parallelism: ranks in a row that share sequences, each with a part of the tokens.

DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509): what acts on each token by itself sees a rank's own tokens. For the
scores, `HeadExchange` replaces the identity exchange of an attention: one all-to-all takes queries, keys and values of
all heads of a part of the tokens to those of a part of the heads for all tokens, and another takes the outputs back.

DeepSpeed is not told. The loss is a mean over the tokens of the global batch, so that ranks may have any part of them:
gradients are averaged over all ranks as they always are.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mosaic_dist.errors import UserError
from mosaic_dist.model import (
    Attention,
    AttentionMetadata,
    AttentionModule,
    MixtureOfExperts,
    Score,
    Transformer,
    make_attention_metadata,
)
from mosaic_dist.parallel.spec import Parallel
from mosaic_dist.parallel.world import World, check_groups, divisors


@dataclass
class PartMetadata(AttentionMetadata):
    """What a part of the tokens of sequences sees, and beside it what all of them see, the same for all layers."""

    whole: AttentionMetadata | None = None


class Sequences:
    """Which sequences a rank trains on, and which part of their tokens. `group` are the ranks that share them."""

    def __init__(self, degree: int, rank: int, world_size: int, group: Any):
        self.degree, self.group = degree, group
        self.place = rank % degree
        self.data_rank, self.data_ranks = rank // degree, world_size // degree

    def cut(self, x_BT: Tensor) -> Tensor:
        """This rank's part of the tokens of whole sequences."""
        assert x_BT.shape[1] % self.degree == 0, f"{x_BT.shape[1]} tokens do not divide by {self.degree} ranks"
        return x_BT.chunk(self.degree, 1)[self.place]

    def metadata(self, inputs_BT: Tensor, documents_BT: Tensor | None) -> AttentionMetadata:
        """What these tokens see."""
        whole = make_attention_metadata(inputs_BT, documents_BT)
        if self.degree == 1:
            return whole
        mine_T = whole.index_T.chunk(self.degree)[self.place]
        return PartMetadata(mine_T, whole.positions_BS, whole.documents_BS, whole)

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks that share sequences, in place. All of them must call."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value


def join_sequences(parallel: Parallel, world: World) -> Sequences:
    """Make the groups. Every rank must call."""
    degree, group = parallel.sequence_parallel, None
    if degree > 1:
        timeout = timedelta(seconds=parallel.timeout_seconds)
        group, _ = dist.new_subgroups(group_size=degree, timeout=timeout)
    return Sequences(degree, world.rank, world.size, group)


class HeadExchange:
    """The exchange of an attention whose sequences are spread over the ranks of a group; see the module's text."""

    def __init__(self, sequences: Sequences):
        self.degree, self.place, self.group = sequences.degree, sequences.place, sequences.group

    def __call__(
        self, score: Score, q_BTNH: Tensor, k_BTGH: Tensor, v_BTGU: Tensor, metadata: AttentionMetadata, index_T: Tensor
    ) -> Tensor:
        """Exchange parts of the sequence for heads, attend, and exchange back. Every rank of the group must call, with
        as many tokens.
        """
        assert isinstance(metadata, PartMetadata), "generation has its sequences on one rank"
        assert metadata.whole is not None
        whole = metadata.whole
        mine = q_BTNH.shape[2] // self.degree
        heads = slice(self.place * mine, (self.place + 1) * mine)
        q_BSnH, k_BSgH, v_BSgU = self._to_heads(q_BTNH, k_BTGH, v_BTGU)
        return self._to_tokens(score(q_BSnH, k_BSgH, v_BSgU, whole, whole.index_T, heads))

    def _to_heads(self, *of_tokens: Tensor) -> list[Tensor]:
        """[B, T, heads, H] of all heads -> [B, S, heads / W, H] of all tokens, each; several travel as one."""
        parts = [_at_least(self.degree, x).unflatten(2, (self.degree, -1)) for x in of_tokens]
        widths = [part.shape[3] * part.shape[4] for part in parts]
        sent_WBTC = torch.cat([part.flatten(3).permute(2, 0, 1, 3) for part in parts], -1)
        came_BSC = _Swap.apply(sent_WBTC, self.group).transpose(0, 1).flatten(1, 2)
        return [x.unflatten(-1, part.shape[3:]) for x, part in zip(came_BSC.split(widths, -1), parts, strict=True)]

    def _to_tokens(self, out_BSnU: Tensor) -> Tensor:
        """[B, S, n, U] -> [B, T, N, U]."""
        sent_WBTnU = out_BSnU.unflatten(1, (self.degree, -1)).transpose(0, 1)
        came_WBTnU = _Swap.apply(sent_WBTnU, self.group)
        return came_WBTnU.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _at_least(ranks: int, x_BTGH: Tensor) -> Tensor:
    """Heads with copies, so that each of the ranks that share a key-value head gets one."""
    return x_BTGH if x_BTGH.shape[2] >= ranks else x_BTGH.repeat_interleave(ranks // x_BTGH.shape[2], 2)


class _Swap(torch.autograd.Function):
    """Send the w-th part along the first dimension to rank w of a group, and put what comes in its place."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _swapped(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _swapped(grad, ctx.group), None


def _swapped(parts: Tensor, group: Any) -> Tensor:
    parts = parts.contiguous()
    came = torch.empty_like(parts)
    dist.all_to_all_single(came, parts, group=group)
    return came


def place_sequences(model: nn.Module, sequences: Sequences) -> None:
    """Let the attentions of a model exchange heads, and its mixtures count the choices of whole micro-batches.

    The mixtures have their experts already (`place_experts`).
    """
    for layer in model.modules() if sequences.degree > 1 else ():
        if isinstance(layer, AttentionModule):
            layer.exchange = HeadExchange(sequences)
        elif isinstance(layer, MixtureOfExperts):
            layer.dispatcher.sequence_group = sequences.group


def check_sequence_parallel(model: Transformer, degree: int, seq_len: int, world_size: int, local_size: int) -> None:
    """UserError for what `degree` ranks cannot share."""
    if degree == 1:
        return
    check_groups("sequence_parallel", degree, world_size, local_size)
    if seq_len % degree:
        raise UserError(
            f"sequences of {seq_len} tokens do not divide by sequence_parallel ({degree}); change data.seq_len, or use "
            f"{divisors(seq_len, at_most=world_size)}"
        )
    for i, block in enumerate(model.layers):
        if not can_share(block.attention, degree):
            fitting = [n for n in range(1, world_size + 1) if can_share(block.attention, n)]
            raise UserError(
                f"model.layers[{i}].attention ({block.attention.type_name!r}) cannot be shared by sequence_parallel "
                f"({degree}) ranks: that must divide its heads, and divide its key-value heads or be a multiple of "
                f"them; use {', '.join(map(str, fitting))}"
            )
        capacity_factor = getattr(block.ffn, "capacity_factor", None)
        if capacity_factor is not None:
            raise UserError(
                f"model.layers[{i}].ffn.capacity_factor is {capacity_factor}, but with sequence_parallel ({degree}) a "
                "rank has only a part of the tokens among which choices would be dropped; use null, or 1 rank"
            )


def can_share(attention: Attention, degree: int) -> bool:
    """Whether so many ranks can share the heads of an attention."""
    counts = attention.head_counts()
    if counts is None or degree == 1:
        return degree == 1
    heads, groups = counts
    return heads % degree == 0 and (groups % degree == 0 or degree % groups == 0)
