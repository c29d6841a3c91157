"""What every feed-forward kind is.

A dense kind is its activation: some layers read the input, the activation joins what they give, and `down` writes the
output. The same activation serves a single network (`Network`) and a stack of experts (`Experts`).
"""

from functools import partial

from torch import Tensor, nn

from mosaic_dist.model.ffn.kernel import Layer, run_experts
from mosaic_dist.model.linear import GroupedLinear, Linear, LinearKind, PlainLinearKind
from mosaic_dist.model.rows import Rows
from mosaic_dist.spec import Positive, Spec

AuxOutputs = dict[str, Tensor]
"""What a layer tells beside its output: `*_loss` scalars, already weighted, that training adds to the loss; other
entries are detached measurements."""


class FFN(Spec):
    """Family of feed-forward networks."""

    def build(self, dim: int) -> nn.Module:
        """Module mapping [B, T, dim] to ([B, T, dim], AuxOutputs)."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of feed-forward network")


class DenseFFN(FFN):
    """Networks that every token passes; each can also serve as the experts of a mixture.

    With `bias` every matrix layer has one. `linear` is the kind of these layers.
    """

    hidden_dim: Positive
    bias: bool = False
    linear: LinearKind = PlainLinearKind()

    def readers(self) -> tuple[str, ...]:
        """Names of the layers that read the input, [dim -> hidden_dim] each."""
        return ("up",)

    def activate(self, *hidden: Tensor) -> Tensor:
        """What these layers give, [..., hidden_dim] each -> what `down` [hidden_dim -> dim] sees, [..., hidden_dim]."""
        raise TypeError(f"{type(self).__name__} has no activation: choose a kind of dense network")

    def build(self, dim: int) -> nn.Module:
        """The network itself, with nothing to tell beside its output."""
        return PlainFFN(self.build_network(dim, self.hidden_dim))

    def build_network(self, dim: int, hidden_dim: int) -> "Network":
        """One network of hidden width `hidden_dim`, mapping [..., dim] to [..., dim]."""
        return Network(self, dim, hidden_dim)

    def build_experts(self, dim: int, hidden_dim: int, experts: int) -> "Experts":
        """That many networks of hidden width `hidden_dim`."""
        return Experts(self, dim, hidden_dim, experts)


class GatedFFN(DenseFFN):
    """Dense kinds with a gate beside the way up."""

    def readers(self) -> tuple[str, ...]:
        """`gate` and `up`."""
        return ("gate", "up")


class Network(nn.Module):
    """One network: a `Linear` by the name of each reader, and `down`."""

    def __init__(self, spec: DenseFFN, dim: int, hidden_dim: int):
        super().__init__()
        self.spec = spec
        linear = partial(spec.linear.build, bias=spec.bias)
        for name in spec.readers():
            self.add_module(name, linear(dim, hidden_dim))
        self.down: Linear = linear(hidden_dim, dim, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down(self.spec.activate(*(self.get_submodule(name)(x) for name in self.spec.readers())))


class Experts(nn.Module):
    """A stack of networks: a `GroupedLinear` by the name of each reader, and `down`."""

    def __init__(self, spec: DenseFFN, dim: int, hidden_dim: int, experts: int):
        super().__init__()
        self.spec = spec
        stack = partial(spec.linear.build_stack, experts, bias=spec.bias)
        for name in spec.readers():
            self.add_module(name, stack(dim, hidden_dim))
        self.down: GroupedLinear = stack(hidden_dim, dim, residual=True)

    def forward(self, x_SD: Tensor, rows: Rows) -> Tensor:
        """x_SD -> [S, D], for each token the weighted sum over its rows; `rows` are those of the experts held here."""
        readers: list[GroupedLinear] = [getattr(self, name) for name in self.spec.readers()]
        first, *_ = readers

        def activate(*hidden: Tensor) -> Tensor:
            return self.down.transform_input(self.spec.activate(*hidden))

        layers = [Layer(*layer()) for layer in (*readers, self.down)]
        return run_experts(first.transform_input(x_SD), rows, activate, layers[:-1], layers[-1])


class PlainFFN(nn.Module):
    """Gives a dense network the interface of the family."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, AuxOutputs]:
        """x_BTD -> ([B, T, D], {})."""
        return self.network(x_BTD), {}
