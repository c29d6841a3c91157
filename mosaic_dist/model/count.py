"""Parameters and floating-point operations of a model, counted on its module (the meta device will do)."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from mosaic_dist.model.attention import AttentionModule
from mosaic_dist.model.linear import GroupedLinear
from mosaic_dist.model.moe import MixtureOfExperts
from mosaic_dist.model.transformer import Transformer, TransformerModel


class Counts(NamedTuple):
    """Parameters of a model. Tied tables are counted once."""

    total: int
    active: int
    """Parameters that one token passes: of each mixture the router, the shared experts and `top_k` of the others."""
    components: dict[str, tuple[int, int]]
    """(total, active) of embedding, position, attention, ffn, norm, head."""


def count_parameters(spec: Transformer) -> Counts:
    """Count without allocating anything."""
    with torch.device("meta"):
        model = spec.build()
    total: Counter[str] = Counter()
    active: Counter[str] = Counter()
    active_experts = _active_experts(model)
    for name, parameter in model.named_parameters():  # a shared parameter is told once, by its first name
        component = _component(name)
        total[component] += parameter.numel()
        top_k, experts = active_experts.get(name, (1, 1))
        active[component] += parameter.numel() // experts * top_k
    return Counts(total.total(), active.total(), {name: (total[name], active[name]) for name in total})


def _active_experts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(experts that one token passes, experts in the stack) of each parameter that stacks routed experts."""
    found = {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, MixtureOfExperts):
            for name, module in layer.experts.named_modules():
                if isinstance(module, GroupedLinear):
                    for parameter, _ in module.named_parameters():
                        found[f"{layer_name}.experts.{name}.{parameter}"] = (layer.spec.top_k, layer.spec.experts)
    return found


def _component(name: str) -> str:
    parts = name.split(".")
    if parts[0] != "layers":
        return parts[0]
    return "norm" if parts[2].endswith("norm") else parts[2]


def flops_per_token(spec: Transformer, seq_len: int) -> float:
    """Operations of forward and backward per token: 6 per active matrix weight, and the scores of attention.

    The usual model-FLOPs convention (Chowdhery et al., arXiv 2204.02311, appendix B) with causal attention counted at
    its half; look-ups are free, a tied table counts once (as the head's matrix).
    """
    counts = count_parameters(spec)
    free = counts.components["position"][1] if "position" in counts.components else 0
    with torch.device("meta"):
        model: TransformerModel = spec.build()
    tied = model.head.weight is model.embedding.weight
    free += 0 if tied else model.embedding.weight.numel()
    scores = sum(module.score_flops(seq_len) for module in model.modules() if isinstance(module, AttentionModule))
    return 6.0 * (counts.active - free) + 3.0 * scores  # backward is twice forward
