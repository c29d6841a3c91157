"""The language model: embedding, positions, blocks, norm, head."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mosaic_dist.model.attention import AttentionMetadata
from mosaic_dist.model.block import BlockKind
from mosaic_dist.model.compatibility import check_pair
from mosaic_dist.model.embedding import Embedding, Table
from mosaic_dist.model.ffn import AuxOutputs
from mosaic_dist.model.head import Head, Tied
from mosaic_dist.model.init import Init, initialize, materialize
from mosaic_dist.model.loss import Loss, Scores
from mosaic_dist.model.norm import Norm, RMSNorm
from mosaic_dist.model.position import Learned, Position
from mosaic_dist.model.width import Factors, MuP, width_factors
from mosaic_dist.spec import Positive, Spec, SpecError, at, override


class Transformer(Spec):
    """A decoder-only language model over `vocab_size` tokens, `dim` wide, for sequences of up to `max_seq_len`
    tokens.
    """

    vocab_size: Positive
    dim: Positive
    max_seq_len: Positive
    embedding: Embedding = Table()
    position: Position = Learned()
    layers: tuple[BlockKind, ...]
    norm: Norm = RMSNorm()
    head: Head = Tied()
    init: Init = Init()
    loss: Loss = Loss()

    def validate(self) -> None:
        """There is a block, and each attention can work with the position."""
        if not self.layers:
            raise SpecError("layers", "the list is empty; give at least one block")
        for i, block in enumerate(self.layers):
            with at(f"layers[{i}]"):
                check_pair(block.attention, self.position)

    def build(self) -> "TransformerModel":
        """The module, on the current default device. `SpecError` with the path of a part that does not fit."""
        return TransformerModel(self)

    def build_initialized(self, seed: int, device: torch.device | str = "cpu") -> "TransformerModel":
        """The module with its initial weights (see `init`)."""
        with torch.device("meta"):
            model = self.build()
        materialize(model, torch.device(device))
        starts = {name: factors.start for name, factors in self.width_factors().items()}
        initialize(model, self.init, len(self.layers), seed, starts)
        return model

    def width_factors(self) -> dict[str, Factors]:
        """What each parameter does otherwise than in the base of `MuP`; empty with another `init`."""
        if not isinstance(self.init, MuP):
            return {}
        with torch.device("meta"), at("init.base"):
            base = override(self, dict(self.init.base)).build()
        with torch.device("meta"):
            return width_factors(self.build(), base)


class LossOutput(NamedTuple):
    """Loss of one micro-batch, in parts that add up over micro-batches and ranks."""

    loss_sum: Tensor
    """Sum over scored tokens of -log p and of the z-loss, float32 scalar."""
    z_loss_sum: Tensor
    """The z-loss in it, detached."""
    auxiliary: Tensor
    """Sum over layers of weighted auxiliary losses (balance, ...), float32 scalar; a mean over tokens."""
    expert_load: Tensor
    """Choices per expert of each layer that has experts, [layers, E] int64; empty where there are none."""
    router: Tensor
    """`ROUTER_MEASURES` of each layer that has experts, [layers, measures] float32; means over tokens."""

    @property
    def cross_entropy_sum(self) -> Tensor:
        """Sum over scored tokens of -log p. Its gradient is that of `loss_sum`: the z-loss is trained with it."""
        return self.loss_sum - self.z_loss_sum


ROUTER_MEASURES = ("balance", "z", "entropy", "drop_rate")
"""What each mixture tells of its routing, beside its load: see `MixtureOfExperts.forward`."""


class TransformerModel(nn.Module):
    """The module of `Transformer`: embedding, position, layers, norm and head."""

    def __init__(self, spec: Transformer):
        super().__init__()
        self.spec = spec
        self.embedding = spec.embedding.build(spec.vocab_size, spec.dim)
        self.position = spec.position.build(spec.dim, spec.max_seq_len)
        self.layers = nn.ModuleList()
        for i, block in enumerate(spec.layers):
            with at(f"layers[{i}]"):
                self.layers.append(block.build(spec.dim, spec.norm, spec.position))
        self.norm = spec.norm.build(spec.dim)
        with at("head"):
            self.head = spec.head.build(spec.vocab_size, spec.dim, self.embedding)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: "Cache | None" = None,
        metadata: AttentionMetadata | None = None,
    ) -> Tensor | LossOutput:
        """tokens_BT int64 -> logits_BTV; with targets_BT int64 (IGNORE_INDEX: not scored) -> LossOutput, see `Loss`.

        `documents_BT` numbers the documents of packed sequences: a token sees its own document only, and positions
        begin anew in each. With a `cache` the tokens follow those that it holds, and join them. Where they are only
        some of the tokens of their sequences, `metadata` tells which, instead of `documents_BT`.
        """
        if metadata is None:
            metadata = (
                cache.advance(tokens_BT, documents_BT) if cache else make_attention_metadata(tokens_BT, documents_BT)
            )
        longest = metadata.positions_BS.shape[1]
        if longest > self.spec.max_seq_len:
            raise ValueError(f"{longest} tokens are more than the model's context ({self.spec.max_seq_len})")
        x_BTD = self.position(self.embedding(tokens_BT), metadata.positions_BT)
        aux_outputs: list[AuxOutputs] = []
        for i, block in enumerate(self.layers):
            x_BTD, extras = block(x_BTD, metadata, cache.layers[i] if cache else None)
            aux_outputs.append(extras)
        x_BTD = self.norm(x_BTD)
        if targets_BT is None:
            return self.head(x_BTD)
        return loss_output(self.spec.loss.score(self.head, x_BTD, targets_BT, self.spec.vocab_size), aux_outputs)

    def new_cache(self, batch: int, capacity: int | None = None) -> "Cache":
        """An empty cache for generation: `batch` sequences of up to `capacity` (None: the context) tokens."""
        capacity = min(capacity or self.spec.max_seq_len, self.spec.max_seq_len)
        return Cache([block.new_cache(batch, capacity) for block in self.layers])  # type: ignore[operator]


class Cache:
    """What generation keeps of the tokens so far: positions and documents here, the rest in a cache per layer."""

    def __init__(self, layers: list[Any]):
        self.layers = layers
        self.documents_BS: Tensor | None = None
        self.length = 0

    def advance(self, tokens_BT: Tensor, documents_BT: Tensor | None) -> AttentionMetadata:
        """Take T more tokens; returns what they see. `documents_BT` None: all belong to the first document, 0."""
        B, T = tokens_BT.shape
        new = tokens_BT.new_zeros(B, T) if documents_BT is None else documents_BT
        self.documents_BS = new if self.documents_BS is None else torch.cat([self.documents_BS, new], 1)
        index_T = torch.arange(self.length, self.length + T, device=tokens_BT.device)
        self.length += T
        return AttentionMetadata(index_T, positions_in_documents(self.documents_BS), self.documents_BS)


def make_attention_metadata(tokens_BT: Tensor, documents_BT: Tensor | None) -> AttentionMetadata:
    """What tokens see that nothing went before."""
    index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    if documents_BT is None:
        return AttentionMetadata(index_T, index_T[None])
    return AttentionMetadata(index_T, positions_in_documents(documents_BT), documents_BT)


def positions_in_documents(documents_BS: Tensor) -> Tensor:
    """Position of each token in its document, [B, S] int64; documents lie in one piece."""
    index_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return index_S - (index_S * begins_BS).cummax(1).values


def loss_output(scores: Scores, aux_outputs: list[AuxOutputs]) -> LossOutput:
    """What the predictions cost, and the auxiliary outputs of the layers, joined."""
    auxiliary = [extras[key].float() for extras in aux_outputs for key in extras if key.endswith("_loss")]
    mixtures = [extras for extras in aux_outputs if "expert_load" in extras]
    loads = [extras["expert_load"] for extras in mixtures]
    measures = [torch.stack([extras[name].float() for name in ROUTER_MEASURES]) for extras in mixtures]
    zero = scores.z_loss.new_zeros(())
    return LossOutput(
        scores.loss,
        scores.z_loss,
        torch.stack(auxiliary).sum() if auxiliary else zero,
        nn.utils.rnn.pad_sequence(loads, batch_first=True) if loads else zero.new_zeros(0, 0, dtype=torch.int64),
        torch.stack(measures) if measures else zero.new_zeros(0, len(ROUTER_MEASURES)),
    )
