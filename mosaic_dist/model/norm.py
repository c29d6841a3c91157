"""Normalisations. Each is computed in float32 inside the kernel and returned in the input's dtype."""

from torch import nn

from mosaic_dist.spec import PositiveFloat, Spec


class Norm(Spec):
    """Family of normalisations over the last dimension."""

    def build(self, dim: int) -> nn.Module:
        """Module mapping [..., dim] to [..., dim]."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of norm")


class RMSNorm(Norm, type="rmsnorm"):
    """Root-mean-square norm with a gain and no bias (Zhang and Sennrich, arXiv 1910.07467)."""

    eps: PositiveFloat = 1e-5

    def build(self, dim: int) -> nn.Module:
        """Gain [dim]."""
        return nn.RMSNorm(dim, eps=self.eps)


class LayerNorm(Norm, type="layernorm"):
    """Layer norm with gain and, by choice, bias (Ba, Kiros and Hinton, arXiv 1607.06450)."""

    eps: PositiveFloat = 1e-5
    bias: bool = True

    def build(self, dim: int) -> nn.Module:
        """Gain [dim], bias [dim]."""
        return nn.LayerNorm(dim, eps=self.eps, bias=self.bias)
