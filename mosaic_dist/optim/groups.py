"""Which parameters decay towards zero, which do not, and which are the matrices of the blocks."""

from typing import Any

from torch import nn

PER_OUTPUT = ("bias", "scale")
"""Names of parameters with a number per output, which are matrices where experts are stacked."""


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
