"""What every kind of position offers: to the embeddings, to queries and keys, or to the scores."""

import torch
from torch import Tensor, nn

from mosaic_dist.spec import Spec


class Constants:
    """A row of float32 numbers, kept on every device where it was needed.

    Under torch.export, tensors have no values that could be kept: the numbers are made anew.
    """

    def __init__(self, values: list[float]):
        self.values = values
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The numbers on a device."""
        kept = self._on.get(device)
        if kept is None:
            kept = torch.tensor(self.values, dtype=torch.float32, device=device)
            if not torch.compiler.is_exporting():
                self._on[device] = kept
        return kept


class HeadPosition:
    """What a kind of position does inside attention: nothing, unless it says otherwise. Has no parameters."""

    def prepare(self, device: torch.device) -> None:
        """Make what is kept per device, before the first call; else that makes it."""

    def rotate(self, x_BTNH: Tensor, positions_BT: Tensor) -> Tensor:
        """Queries or keys with positions in them."""
        return x_BTNH

    def bias(self, queries_BT: Tensor, keys_BS: Tensor, heads: slice = slice(None)) -> Tensor | None:
        """What is added to the scores, [B, n, T, S], for positions of queries and keys, of these of the heads.

        None for nothing.
        """
        return None


class PositionModule(nn.Module):
    """What a kind of position does to the embeddings: nothing, unless it says otherwise."""

    def forward(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Embeddings of tokens at these positions (B may be 1) -> the same with positions."""
        return x_BTD


class Position(Spec):
    """Family of position encodings."""

    def build(self, dim: int, max_seq_len: int) -> PositionModule:
        """What is done to the embeddings, for positions below `max_seq_len`."""
        return PositionModule()

    def for_heads(self, heads: int, head_dim: int) -> HeadPosition:
        """What is done in an attention with so many heads of such a width."""
        return HeadPosition()


class NoPosition(Position, type="none"):
    """No position encoding; causal attention alone tells the order (Haviv et al., arXiv 2203.16634)."""
