"""What every feed-forward kind is.

A dense kind is written once over its matrix layers: `build_with(dim, width, linear)` gets the factory of the layers,
so the same code is a single network (`Linear`) or a stack of experts (`GroupedLinear`), whose layers take the rows
per expert as a further argument. Which kind of matrix they are, and whether they have biases, is the factory's.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from mosaic_dist.model.linear import Matrix, PlainMatrix
from mosaic_dist.spec import Positive, Spec

Extras = dict[str, Tensor]
"""What a layer tells beside its output: `*_loss` scalars, already weighted, that training adds to the loss; other
entries are detached measurements."""


class LinearFactory(Protocol):
    """Makes the matrix layers of a feed-forward network: `linear(inputs, outputs, residual=False)`."""

    def __call__(self, inputs: int, outputs: int, *, residual: bool = False) -> Callable[..., Tensor]:
        """The layer, an `nn.Module`."""


class FFN(Spec):
    """Family of feed-forward networks."""

    def build(self, dim: int) -> nn.Module:
        """Module mapping [B, T, dim] to ([B, T, dim], Extras)."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of feed-forward network")


class DenseFFN(FFN):
    """Networks that every token passes; each can also serve as the experts of a mixture.

    With `bias` every matrix layer has one. `matrix` is the kind of these layers.
    """

    width: Positive
    bias: bool = False
    matrix: Matrix = PlainMatrix()

    def build(self, dim: int) -> nn.Module:
        """The network itself, with nothing to tell beside its output."""
        return PlainFFN(self.build_network(dim, self.width))

    def build_network(self, dim: int, width: int) -> nn.Module:
        """One network of hidden width `width`, mapping [..., dim] to [..., dim]."""
        return self.build_with(dim, width, partial(self.matrix.build, bias=self.bias))

    def build_experts(self, dim: int, width: int, experts: int) -> nn.Module:
        """Stacked networks, mapping (rows [R, dim] sorted by expert, rows per expert) to [R, dim]."""
        return self.build_with(dim, width, partial(self.matrix.build_stack, experts, bias=self.bias))

    def build_with(self, dim: int, width: int, linear: LinearFactory) -> nn.Module:
        """Module over layers made by `linear`, mapping (x [..., dim], *groups) to [..., dim]."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of dense network")


class PlainFFN(nn.Module):
    """Gives a dense network the interface of the family."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Extras]:
        """x_BTD -> ([B, T, D], {})."""
        return self.network(x_BTD), {}
