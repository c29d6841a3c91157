"""The seam between routing and experts: where rows may travel to wherever their expert lives."""

from collections.abc import Callable

from torch import Tensor, nn

from mosaic_dist.model.ffn import Experts
from mosaic_dist.model.rows import Rows


class LocalDispatcher(nn.Module):
    """All experts are here, so rows stay where they are. Other exchanges keep this interface."""

    def forward(self, x_SD: Tensor, rows: Rows, experts: Experts, overlap_fn: Callable[[], None]) -> Tensor:
        """x_SD -> [S, D], for each token the sum over its choices of weight times expert.

        `overlap_fn` is work that needs nothing of it; where rows travel, it is done while they are on their way.
        """
        overlap_fn()
        return experts(x_SD, rows)

    def total_counts(self, counts_E: Tensor) -> Tensor:
        """Choices per expert of all processes that train together."""
        return counts_E

    def micro_batch_counts(self, counts: Tensor) -> Tensor:
        """Choices per expert, [E] or of each sequence [B, E], of all processes that have a part of its tokens."""
        return counts
