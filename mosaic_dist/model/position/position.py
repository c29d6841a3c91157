"""What every kind of position offers to the model."""

from torch import Tensor, nn

from mosaic_dist.spec import Spec


class Position(Spec):
    """Family of position encodings."""

    def build(self, dim: int, context: int) -> "PositionModule":
        """Module for sequences of up to `context` tokens."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of position")


class PositionModule(nn.Module):
    """Adds nothing: the base, and the encoding of models without positions."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Embeddings of tokens 0 ... T-1 -> the same with positions."""
        return x_BTD


class NoPosition(Position, type="none"):
    """No position encoding; causal attention alone tells the order (Haviv et al., arXiv 2203.16634)."""

    def build(self, dim: int, context: int) -> PositionModule:
        """Nothing to learn."""
        return PositionModule()
