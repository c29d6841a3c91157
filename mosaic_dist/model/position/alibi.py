"""ALiBi: a penalty on scores that grows with distance (Press et al., arXiv 2108.12409)."""

import math

import torch
from torch import Tensor

from mosaic_dist.model.position.position import Constants, HeadPosition, Position


class ALiBi(Position, type="alibi"):
    """Score - slope * distance, with a slope per head. Works at any length."""

    def for_heads(self, heads: int, head_dim: int) -> HeadPosition:
        """Slopes as in the paper's code: a geometric series, filled up by every other one of the next series."""
        return ALiBiBias(slopes(heads))


def slopes(heads: int) -> list[float]:
    """Slopes of the heads: 2^(-8/n), 2^(-16/n), ... for n a power of two."""
    power = 2 ** math.floor(math.log2(heads))
    series = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return series + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


class ALiBiBias(HeadPosition):
    """Bias on attention scores that grows linearly with distance, with a slope per head."""

    def __init__(self, slopes_N: list[float]):
        self.slopes_N = slopes_N
        self._kept = Constants(slopes_N)

    def prepare(self, device: torch.device) -> None:
        """Keep the slopes there."""
        self._kept.on(device)

    def bias(self, queries_BT: Tensor, keys_BS: Tensor, heads: slice = slice(None)) -> Tensor:
        """-slope * (query position - key position)."""
        slopes_N = self._kept.on(queries_BT.device)[heads]
        distance_BTS = (queries_BT[:, :, None] - keys_BS[:, None, :]).float()
        return -slopes_N[None, :, None, None] * distance_BTS[:, None]
