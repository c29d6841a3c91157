"""Mixture of experts: router, dispatcher and experts. One kind of router per file."""

from mosaic_dist.model.moe.dispatch import LocalDispatcher
from mosaic_dist.model.moe.moe import MixtureOfExperts, MoE, MoEBase, MoESwiGLU
from mosaic_dist.model.moe.router import Router, Routing
from mosaic_dist.model.moe.sigmoid_top_k import SigmoidTopK
from mosaic_dist.model.moe.softmax_top_k import SoftmaxTopK
from mosaic_dist.model.moe.top_k_softmax import TopKSoftmax

__all__ = [
    "LocalDispatcher",
    "MixtureOfExperts",
    "MoE",
    "MoEBase",
    "MoESwiGLU",
    "Router",
    "Routing",
    "SigmoidTopK",
    "SoftmaxTopK",
    "TopKSoftmax",
]
