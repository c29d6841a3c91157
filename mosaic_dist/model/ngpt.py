"""The normalised Transformer's block (nGPT; Loshchilov et al., arXiv 2410.01131): hidden states stay on a sphere."""

import math
from typing import Any

from torch import Tensor, nn

from mosaic_dist.model.attention import AttentionMetadata
from mosaic_dist.model.block import BlockKind, BlockModule
from mosaic_dist.model.norm import Norm
from mosaic_dist.model.position import Position
from mosaic_dist.model.unit import Scale, unit
from mosaic_dist.spec import PositiveFloat


class NormalizedBlock(BlockKind, type="ngpt"):
    """h = unit(h + a * (unit(attention(h)) - h)), then the same with the feed-forward network; unit(x) is x / |x|.

    Each part moves the hidden state a learned share `a` of the way to its own output, per dimension, which starts at
    `step_size` (section 2.2). Every block makes what it is given a unit vector first: this normalises the
    embeddings in the first block, changes nothing in later ones, and lets blocks of other kinds stand in between. The
    model's norm plays no part inside. The whole of nGPT has, besides, `UnitLinearKind` in attention and feed-forward
    network, `UnitNorm` and `UnitHead` in the model, and `qk_norm` in the attention.

    With `qk_norm` the scores are sqrt(H) * cos(q, k) at the start, as in the paper: both vectors have length sqrt(H),
    and scores are divided by sqrt(H) where the paper multiplies unit vectors by it. The learned gains differ from its
    s_qk: queries and keys have one each, shared by the heads and applied before positions rotate, and they are stored
    as they are.
    """

    step_size: PositiveFloat = 0.05

    def build(self, dim: int, norm: Norm, position: Position) -> "SphereBlock":
        """Build attention, feed-forward network and the two steps on the sphere."""
        attention, ffn = self.build_parts(dim, norm, position)
        return SphereBlock(
            attention, ffn, SphereStep(dim, self.step_size), SphereStep(dim, self.step_size), self.dropout
        )


class SphereStep(nn.Module):
    """Goes from one unit vector towards another direction; step.weight [dim]."""

    def __init__(self, dim: int, step_size: float):
        super().__init__()
        self.step = Scale(dim, start=step_size, stored=1 / math.sqrt(dim))

    def forward(self, h_BTD: Tensor, target_BTD: Tensor) -> Tensor:
        """Unit vectors h_BTD, targets of any length -> unit vectors [B, T, D]."""
        # the paper's shares are not negative; Adam alone would let them cross zero
        return unit(h_BTD + self.step().abs() * (unit(target_BTD) - h_BTD))


class SphereBlock(BlockModule):
    """Block of normalised GPT. Its norms are `SphereStep`s, of hidden state and output of a part."""

    def before_ffn(self, x_BTD: Tensor, metadata: AttentionMetadata, cache: Any) -> tuple[Tensor, Tensor]:
        """A step on the sphere towards attention's output; the new hidden state is also the input of the feed-forward
        network.
        """
        h_BTD = unit(x_BTD)
        h_BTD = self.attention_norm(h_BTD, self.drop(self.attention(h_BTD, metadata, cache)))
        return h_BTD, h_BTD

    def after_ffn(self, x_BTD: Tensor, out_BTD: Tensor) -> Tensor:
        """A step on the sphere towards the feed-forward network's output; what comes out has length one."""
        return self.ffn_norm(x_BTD, self.drop(out_BTD))
