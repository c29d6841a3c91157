"""Operations of all matrix products, layer by layer.

`model.count.flops_per_token` is the usual convention for the model's own arithmetic, where attention counts what a
token sees; here every product counts in full, as attention that is written out computes it.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from mosaic_dist.model import MixtureOfExperts, Transformer
from mosaic_dist.model.attention import AttentionModule
from mosaic_dist.model.linear import GroupedLinear
from mosaic_dist.model.moe.router import RouterModule


def product_flops(spec: Transformer, seq_len: int) -> int:
    """Per token of a sequence of `seq_len`, forward and backward, nothing run twice; for softmax attention.

    Each product of the forward pass has two as large in the backward pass: for its input and for its matrix.
    """
    with torch.device("meta"):
        model: Any = _without_windows(spec).build()
    elements = model.head.weight.numel()
    scores = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear | RouterModule):
            elements += module.weight.numel()
        elif isinstance(module, MixtureOfExperts):
            stacks = [stack.weight for stack in module.experts.modules() if isinstance(stack, GroupedLinear)]
            elements += sum(weight.numel() for weight in stacks) // module.spec.experts * module.spec.top_k
        elif isinstance(module, AttentionModule):
            scores += 2 * module.score_flops(seq_len)  # the square has twice what the triangle has
    return round(3 * (2 * elements + scores))


def _without_windows(spec: Transformer) -> Transformer:
    def wide(block: Any) -> Any:
        if getattr(block.attention, "sliding_window", None) is None:
            return block
        return dataclasses.replace(block, attention=dataclasses.replace(block.attention, sliding_window=None))

    return dataclasses.replace(spec, layers=tuple(wide(block) for block in spec.layers))
