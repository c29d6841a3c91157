"""The seam between routing and experts: where rows may travel to wherever their expert lives."""

from torch import Tensor, nn


class LocalExchange(nn.Module):
    """All experts are here, so rows stay where they are. Other exchanges keep this interface.

    `dispatch` takes rows [R, D] sorted by expert and counts [E] int64 of the model's experts; it returns the rows for
    the experts held here, sorted by expert, the counts of these experts as a list of e integers, and a plan that
    `combine` uses to bring results back into the order that `dispatch` was given.
    """

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor) -> tuple[Tensor, list[int], object]:
        """Send every row to its expert."""
        return rows_RD, counts_E.tolist(), None

    def combine(self, rows_RD: Tensor, plan: object) -> Tensor:
        """Bring every result back."""
        return rows_RD
