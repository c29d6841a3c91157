"""Mixture of experts: router, exchange and experts."""

from mosaic_dist.model.moe.exchange import LocalExchange
from mosaic_dist.model.moe.moe import MixtureOfExperts, MoE

__all__ = ["LocalExchange", "MixtureOfExperts", "MoE"]
