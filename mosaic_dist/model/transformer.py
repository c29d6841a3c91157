"""The language model: embedding, positions, blocks, norm, head."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.model.block import Block
from mosaic_dist.model.embedding import Embedding, Table
from mosaic_dist.model.ffn import Extras
from mosaic_dist.model.head import Head, Tied
from mosaic_dist.model.init import Init, initialize, materialize
from mosaic_dist.model.norm import Norm, RMSNorm
from mosaic_dist.model.position import Learned, Position
from mosaic_dist.spec import Positive, Spec, SpecError, at
from mosaic_dist.targets import IGNORE_INDEX


class Transformer(Spec):
    """A decoder-only language model over `vocab` tokens, `dim` wide, for sequences of up to `context` tokens."""

    vocab: Positive
    dim: Positive
    context: Positive
    embedding: Embedding = Table()
    position: Position = Learned()
    blocks: tuple[Block, ...]
    norm: Norm = RMSNorm()
    head: Head = Tied()
    init: Init = Init()

    def check(self) -> None:
        """There is a block."""
        if not self.blocks:
            raise SpecError("blocks", "the list is empty; give at least one block")

    def build(self) -> "TransformerModel":
        """The module, on the current default device. `SpecError` with the path of a part that does not fit."""
        return TransformerModel(self)

    def build_initialized(self, seed: int, device: torch.device | str = "cpu") -> "TransformerModel":
        """The module with its initial weights (see `init`)."""
        with torch.device("meta"):
            model = self.build()
        materialize(model, torch.device(device))
        initialize(model, self.init, len(self.blocks), seed)
        return model


class LossParts(NamedTuple):
    """Loss of one micro-batch, in parts that add up over micro-batches and ranks."""

    cross_entropy_sum: Tensor
    """Sum over scored tokens of -log p, float32 scalar."""
    auxiliary: Tensor
    """Sum over layers of weighted auxiliary losses (balance, ...), float32 scalar; a mean over tokens."""
    expert_load: Tensor
    """Choices per expert of each layer that has experts, [layers, E] int64; empty where there are none."""


class TransformerModel(nn.Module):
    """See `Transformer`."""

    def __init__(self, spec: Transformer):
        super().__init__()
        self.spec = spec
        self.embedding = spec.embedding.build(spec.vocab, spec.dim)
        self.position = spec.position.build(spec.dim, spec.context)
        self.blocks = nn.ModuleList()
        for i, block in enumerate(spec.blocks):
            with at(f"blocks[{i}]"):
                self.blocks.append(block.build(spec.dim, spec.norm))
        self.norm = spec.norm.build(spec.dim)
        self.head = spec.head.build(spec.vocab, spec.dim, self.embedding)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor | LossParts:
        """tokens_BT int64 -> logits_BTV; with targets_BT int64 (IGNORE_INDEX: not scored) -> LossParts."""
        if tokens_BT.shape[1] > self.spec.context:
            raise ValueError(f"{tokens_BT.shape[1]} tokens are more than the model's context ({self.spec.context})")
        x_BTD = self.position(self.embedding(tokens_BT))
        told: list[Extras] = []
        for block in self.blocks:
            x_BTD, extras = block(x_BTD)
            told.append(extras)
        logits_BTV = self.head(self.norm(x_BTD))
        return logits_BTV if targets_BT is None else loss_parts(logits_BTV, targets_BT, told)


def loss_parts(logits_BTV: Tensor, targets_BT: Tensor, told: list[Extras]) -> LossParts:
    """Cross-entropy in float32, and what the layers told."""
    cross_entropy = functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    auxiliary = [extras[key].float() for extras in told for key in extras if key.endswith("_loss")]
    loads = [extras["expert_load"] for extras in told if "expert_load" in extras]
    return LossParts(
        cross_entropy,
        torch.stack(auxiliary).sum() if auxiliary else cross_entropy.new_zeros(()),
        nn.utils.rnn.pad_sequence(loads, batch_first=True) if loads else targets_BT.new_zeros(0, 0),
    )
