"""Which parameters decay towards zero, which do not, which are the matrices of the blocks, and how fast each learns."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

PER_OUTPUT = ("bias", "scale")
"""Names of parameters with a number per output, which are matrices where experts are stacked."""


class Rates(Protocol):
    """Factors on a parameter's learning rate, one where Adam updates it and one where Muon does."""

    @property
    def rate(self) -> float:
        """Under Adam."""

    @property
    def muon_rate(self) -> float:
        """Where Muon updates it."""


NO_RATES: Mapping[str, Rates] = {}
"""All parameters learn at the same rate."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups `decay` and `no_decay` over the trainable parameters, in the model's order.

    Weight decay is for matrices that multiply activations. Look-up tables (token embedding, learned positions), gains,
    scales and biases are left alone, whatever their shape: they are told by their module or name, not by their number
    of dimensions. A table shared with the output head counts as a table.
    """
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        table = getattr(module, "is_table", False) or isinstance(module, nn.RMSNorm | nn.LayerNorm)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                vector = name in PER_OUTPUT or parameter.dim() < 2
                groups["no_decay" if table or vector else "decay"].append(parameter)
    decays = {"decay": weight_decay, "no_decay": 0.0}
    return [{"name": key, "params": group, "weight_decay": decays[key]} for key, group in groups.items() if group]


def split_matrices(groups: list[dict[str, Any]], blocks: nn.Module) -> list[dict[str, Any]]:
    """Take the decaying parameters of the blocks, all of them matrices or stacks of such, into a group `matrices`.

    Every group says in `by_muon` whether it is that one, under whatever name it is split up later.
    """
    inside = set(blocks.parameters())
    found: list[dict[str, Any]] = []
    for group in groups:
        matrices = [p for p in group["params"] if p in inside] if group["name"] == "decay" else []
        others = [p for p in group["params"] if p not in inside] if matrices else group["params"]
        for name, members, by_muon in (("matrices", matrices, True), (group["name"], others, False)):
            if members:
                found.append(group | {"name": name, "params": members, "by_muon": by_muon})
    return found


def split_rates(groups: list[dict[str, Any]], model: nn.Module, rates: Mapping[str, Rates]) -> list[dict[str, Any]]:
    """Split each group by the factor on its parameters' learning rate, which is its `rate`; 1 for those not in `rates`.

    What a step takes off a weight, learning_rate * rate * weight_decay of it, is the same for all that decay: the size
    that weights settle at is not to depend on how fast they learn (Wang and Aitchison, arXiv 2405.13698).
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: list[dict[str, Any]] = []
    for group in groups:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            factors = rates.get(names[parameter])
            of_group = 1.0 if factors is None else factors.muon_rate if group.get("by_muon") else factors.rate
            by_rate.setdefault(of_group, []).append(parameter)
        for rate, members in by_rate.items():
            name = group["name"] if rate == 1.0 else f"{group['name']}_{rate}"
            decay = group["weight_decay"] / rate
            found.append(group | {"name": name, "params": members, "weight_decay": decay, "rate": rate})
    return found
