"""Normalisations. Each is computed in float32 inside and returned in the input's dtype."""

from torch import Tensor, nn

from mosaic_dist.model.unit import unit
from mosaic_dist.spec import PositiveFloat, Spec


class Norm(Spec):
    """Family of normalisations over the last dimension."""

    def build(self, dim: int) -> nn.Module:
        """Module mapping [..., dim] to [..., dim]."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of norm")


INNER_NORM_EPS = 1e-6
"""Of norms inside the layers, where neither they nor the model's norm state one."""


def epsilon(norm: Norm) -> float:
    """A norm's `eps`, for norms inside the layers; `INNER_NORM_EPS` for a kind that has none."""
    return getattr(norm, "eps", INNER_NORM_EPS)


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


class UnitNorm(Norm, type="unit"):
    """x / |x|, without a gain: a point of the unit sphere (nGPT, arXiv 2410.01131). Zeros stay zeros."""

    def build(self, dim: int) -> nn.Module:
        """No parameters."""
        return UnitNormModule()


class UnitNormModule(nn.Module):
    """Divides each vector by its Euclidean length; no parameters."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD -> [B, T, D]."""
        return unit(x_BTD)
