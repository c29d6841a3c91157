"""What the routing of a step says of each layer with experts, in plain numbers for people."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mosaic_dist.model import MoEBase, Transformer
from mosaic_dist.model.transformer import ROUTER_MEASURES

if TYPE_CHECKING:  # DeepSpeed comes with them, which who only draws what was written does without
    from mosaic_dist.parallel import Engine, StepResult

Experts = dict[str, dict[str, Any]]
"""The figures of a step by layer, as `MetricsFile` describes them."""


def loads_by_layer(model: Transformer, load_LE: Tensor) -> dict[str, Tensor]:
    """Choices per expert of each block that has experts, [E] int64 without padding, by the block's name in the model.

    `load_LE` is that of a `StepResult`: rows in the order of the blocks, zeros to the right of what a layer has.
    """
    experts = {
        f"layers.{i}": block.ffn.experts for i, block in enumerate(model.layers) if isinstance(block.ffn, MoEBase)
    }
    return {name: load_E[:E] for (name, E), load_E in zip(experts.items(), load_LE, strict=True)}


def max_over_mean(load_E: Tensor) -> float:
    """How much more than an even share the busiest expert has: 1 for a perfect balance, E / top_k at the worst."""
    return (load_E.max() / load_E.double().mean()).item()


def describe_experts(model: Transformer, result: "StepResult", engine: "Engine") -> Experts:
    """The figures of a step. The corrections are those that the step left behind."""
    loads = loads_by_layer(model, result.expert_load)
    routers = [layer.router for layer in engine.mixtures]
    return {
        name: _describe_layer(load_E, measures, dict(router.named_buffers()).get("expert_bias"))
        for (name, load_E), measures, router in zip(loads.items(), result.router, routers, strict=True)
    }


def _describe_layer(load_E: Tensor, measures: Tensor, expert_bias_E: Tensor | None) -> dict[str, Any]:
    """`measures` are `ROUTER_MEASURES`."""
    figures = {
        "load": load_E.tolist(),
        "max_over_mean": max_over_mean(load_E),
        "dead": (load_E == 0).double().mean().item(),
        **dict(zip(ROUTER_MEASURES, measures.tolist(), strict=True)),
    }
    if expert_bias_E is not None:
        figures["expert_bias"] = torch.stack(expert_bias_E.aminmax()).tolist()
    return figures


def flatten(experts: Experts) -> tuple[dict[str, float], dict[str, list[int]]]:
    """The figures for trackers, which know numbers with names: `experts/layers.1/dead`; the loads apart from them."""
    values: dict[str, float] = {}
    loads: dict[str, list[int]] = {}
    for layer, figures in experts.items():
        for name, value in figures.items():
            path = f"experts/{layer}/{name}"
            if name == "load":
                loads[path] = value
            elif name == "expert_bias":
                values |= {f"{path}_min": value[0], f"{path}_max": value[1]}
            else:
                values[path] = value
    return values, loads
