"""What every feed-forward kind is.

A dense kind is its activation: some layers read the input, the activation joins what they give, and `down` writes the
output. The same activation serves a single network (`Network`) and a stack of experts (`Experts`).
"""

from functools import partial

from torch import Tensor, nn

from mosaic_dist.model.ffn.kernel import Layer, run_experts
from mosaic_dist.model.linear import GroupedLinear, Linear, Matrix, PlainMatrix
from mosaic_dist.model.rows import Rows
from mosaic_dist.spec import Positive, Spec

Extras = dict[str, Tensor]
"""What a layer tells beside its output: `*_loss` scalars, already weighted, that training adds to the loss; other
entries are detached measurements."""


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

    def readers(self) -> tuple[str, ...]:
        """Names of the layers that read the input, [dim -> width] each."""
        return ("up",)

    def activate(self, *hidden: Tensor) -> Tensor:
        """What these layers give, [..., width] each -> what `down` [width -> dim] sees, [..., width]."""
        raise TypeError(f"{type(self).__name__} has no activation: choose a kind of dense network")

    def build(self, dim: int) -> nn.Module:
        """The network itself, with nothing to tell beside its output."""
        return PlainFFN(self.build_network(dim, self.width))

    def build_network(self, dim: int, width: int) -> "Network":
        """One network of hidden width `width`, mapping [..., dim] to [..., dim]."""
        return Network(self, dim, width)

    def build_experts(self, dim: int, width: int, experts: int) -> "Experts":
        """That many networks of hidden width `width`."""
        return Experts(self, dim, width, experts)


class GatedFFN(DenseFFN):
    """Dense kinds with a gate beside the way up."""

    def readers(self) -> tuple[str, ...]:
        """See `DenseFFN.readers`."""
        return ("gate", "up")


class Network(nn.Module):
    """One network: a `Linear` by the name of each reader, and `down`."""

    def __init__(self, spec: DenseFFN, dim: int, width: int):
        super().__init__()
        self.spec = spec
        linear = partial(spec.matrix.build, bias=spec.bias)
        for name in spec.readers():
            self.add_module(name, linear(dim, width))
        self.down: Linear = linear(width, dim, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down(self.spec.activate(*(self.get_submodule(name)(x) for name in self.spec.readers())))


class Experts(nn.Module):
    """A stack of networks: a `GroupedLinear` by the name of each reader, and `down`."""

    def __init__(self, spec: DenseFFN, dim: int, width: int, experts: int):
        super().__init__()
        self.spec = spec
        stack = partial(spec.matrix.build_stack, experts, bias=spec.bias)
        for name in spec.readers():
            self.add_module(name, stack(dim, width))
        self.down: GroupedLinear = stack(width, dim, residual=True)

    def forward(self, x_SD: Tensor, rows: Rows) -> Tensor:
        """x_SD -> [S, D], for each token the weighted sum over its rows; `rows` are those of the experts held here."""
        readers: list[GroupedLinear] = [getattr(self, name) for name in self.spec.readers()]
        first, *_ = readers

        def activate(*hidden: Tensor) -> Tensor:
            return self.down.seen_rows(self.spec.activate(*hidden))

        layers = [Layer(*layer()) for layer in (*readers, self.down)]
        return run_experts(first.seen_rows(x_SD), rows, activate, layers[:-1], layers[-1])


class PlainFFN(nn.Module):
    """Gives a dense network the interface of the family."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Extras]:
        """x_BTD -> ([B, T, D], {})."""
        return self.network(x_BTD), {}
