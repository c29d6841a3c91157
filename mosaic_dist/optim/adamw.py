"""AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mosaic_dist.optim.groups import NO_RATES, Rates, parameter_groups, split_rates
from mosaic_dist.spec import NonNegativeFloat, PositiveFloat, Spec, UnitInterval


class Optimizer(Spec):
    """Family of optimizers. `learning_rate` is the peak; the schedule scales it. `max_grad_norm` 0 turns clipping
    off.
    """

    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat = 0.1
    max_grad_norm: NonNegativeFloat = 1.0

    def groups(self, model: nn.Module, rates: Mapping[str, Rates] = NO_RATES) -> list[dict[str, Any]]:
        """The groups of a model's parameters that `build` wants; `rates` by parameter name.

        Whoever sets a group's learning rate multiplies it by the group's `rate`.
        """
        return split_rates(parameter_groups(model, self.weight_decay), model, rates)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups (see `groups`)."""
        raise TypeError(f"{type(self).__name__} cannot be built: choose a kind of optimizer")


class AdamW(Optimizer, type="adamw"):
    """Adam with decoupled weight decay, in PyTorch's fused form."""

    beta1: UnitInterval = 0.9
    beta2: UnitInterval = 0.95
    eps: PositiveFloat = 1e-8

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """`torch.optim.AdamW` with this spec's values."""
        return torch.optim.AdamW(
            groups, lr=self.learning_rate, betas=(self.beta1, self.beta2), eps=self.eps, fused=True
        )
