"""Expert parallelism: the experts of a layer spread over the ranks of DeepSpeed's expert groups.

`AllToAllDispatcher` replaces the identity exchange of a mixture-of-experts layer: each row travels, with its routing
weight, to the rank that holds its expert, and the weighted result back; a first, small exchange tells everybody how
many rows to expect. Per choice of a token that is dim + 1 numbers there and dim back, and the same in the backward
pass.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor, nn

from mosaic_dist.errors import UserError
from mosaic_dist.model import Experts, GroupedLinear, LocalDispatcher, MixtureOfExperts, Rows, permute, unpermute
from mosaic_dist.parallel.world import check_groups, divisors


class Transfer:
    """Rows on their way: `send[w]` of them to rank w of a group, `receive[w]` from it; the gradient the other way.

    `start` and `arrive` are two steps of the autograd graph, so that what is computed between them runs while rows
    travel, forward as well as backward. Every rank of the group must call both, in the same order.
    """

    def __init__(self, send: list[int], receive: list[int], group: Any):
        self.send, self.receive, self.group = send, receive, group
        self.under_way: tuple[Any, Tensor, Tensor] | None = None

    def launch(self, rows_RD: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Begin to send; returns what `wait` will have filled."""
        assert self.under_way is None, "a transfer carries one load at a time"
        rows_RD, out_RD = rows_RD.contiguous(), rows_RD.new_empty(sum(receive), rows_RD.shape[1])
        work = dist.all_to_all_single(out_RD, rows_RD, receive, send, group=self.group, async_op=True)
        self.under_way = work, rows_RD, out_RD  # the rows stay until they have left
        return out_RD

    def wait(self) -> Tensor:
        """The rows that were sent to here, all of them."""
        assert self.under_way is not None, "nothing was sent"
        work, _, out_RD = self.under_way
        work.wait()
        self.under_way = None
        return out_RD

    def start(self, rows_RD: Tensor) -> Tensor:
        """Send rows; only `arrive` may look at the result."""
        return _Start.apply(rows_RD, self)

    def arrive(self, coming_RD: Tensor) -> Tensor:
        """The rows that were sent to here."""
        return _Arrive.apply(coming_RD, self)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.launch(rows_RD, transfer.send, transfer.receive)

    @staticmethod
    def backward(ctx: Any, unused_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.wait(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coming_RD: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.wait().view_as(coming_RD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.launch(grad_RD, ctx.transfer.receive, ctx.transfer.send)
        return grad_RD, None  # of the shape that autograd wants here; what arrives goes from the transfer to `_Start`


class DataParallelCounts:
    """Sums the counts of a layer over ranks: with or without expert parallelism, each sees other tokens."""

    sequence_group: Any = None
    """The ranks that have parts of the same sequences, where there are several; see `sequence.py`."""

    def total_counts(self, counts_E: Tensor) -> Tensor:
        """Choices per expert, summed over all data-parallel ranks. Every rank must call."""
        total_E = counts_E.clone()
        dist.all_reduce(total_E)
        return total_E

    def micro_batch_counts(self, counts: Tensor) -> Tensor:
        """Choices per expert of a micro-batch, summed over the ranks that share its sequences. Every rank must call."""
        if self.sequence_group is None:
            return counts
        total = counts.clone()
        dist.all_reduce(total, group=self.sequence_group)
        return total


class ReplicatedExperts(DataParallelCounts, LocalDispatcher):
    """The exchange of a layer whose experts are all on every rank."""


class AllToAllDispatcher(DataParallelCounts, AutoEPMoELayer):
    """Sends each row to the rank that holds its expert, and the weighted result back; the interface is
    `LocalDispatcher`'s.

    It derives from DeepSpeed's AutoEP layer, of which it uses nothing, because the engine looks for that class to see
    that a model has experts and to allow them under ZeRO-3 (`deepspeed.moe.layer.MoE` is refused there).
    """

    def __init__(self, experts: int, degree: int, rank: int):
        nn.Module.__init__(self)
        self.num_experts, self.num_local_experts = experts, experts // degree
        self.ep_size, self.ep_rank = degree, rank % degree
        self.ep_group_name = f"ep_size_{degree}"
        self.group: Any = None

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: Any = None
    ) -> None:
        """Called by the DeepSpeed engine: make the expert groups once, and take this rank's."""
        if self.ep_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size)
        self.group = groups._get_expert_parallel_group(self.ep_group_name)
        assert dist.get_rank(self.group) == self.ep_rank, "experts were placed for another rank of the expert group"

    def forward(self, x_SD: Tensor, rows: Rows, experts: Experts, overlap_fn: Callable[[], None]) -> Tensor:
        """Outputs of the experts for x_SD [S, D]. Every rank of the expert group must call, also with no rows."""
        counts_We = rows.counts_E.view(self.ep_size, -1)
        arriving_We = torch.empty_like(counts_We)
        dist.all_to_all_single(arriving_We, counts_We.contiguous(), group=self.group)
        # one transfer to the host for all that it must know
        send, receive = torch.stack([counts_We.sum(1), arriving_We.sum(1)]).tolist()
        there, back = Transfer(send, receive, self.group), Transfer(receive, send, self.group)

        weights_R1 = rows.weights_R[:, None].to(x_SD.dtype)
        coming = there.start(torch.cat([permute(x_SD, rows), weights_R1], 1))
        overlap_fn()
        held = there.arrive(coming)
        results_RD = experts(held[:, :-1], self._by_expert(held[:, -1], arriving_We))
        return unpermute(back.arrive(back.start(results_RD)), rows)

    def _by_expert(self, weights_R: Tensor, arriving_We: Tensor) -> Rows:
        """The order of the experts for rows that came sorted by (source, expert)."""
        expert_We = torch.arange(self.num_local_experts, device=weights_R.device).repeat(self.ep_size)
        expert_R = expert_We.repeat_interleave(arriving_We.flatten(), output_size=len(weights_R))
        order_R = expert_R.argsort(stable=True)
        places_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        return Rows(order_R, weights_R[order_R], places_R[:, None], arriving_We.sum(0))


def expert_counts(model: nn.Module) -> list[int]:
    """The number of experts of each layer that has some."""
    return [layer.spec.experts for layer in model.modules() if isinstance(layer, MixtureOfExperts)]


def choose_degree(asked: int | str, experts: list[int], world_size: int, local_size: int) -> int:
    """The expert-parallel degree: `asked`, or for "auto" the largest that divides the experts and fits in a node.

    Expert groups are ranks in a row, so one of at most a node's size lies inside a node. Raises UserError where experts
    or ranks do not divide by the degree, and where groups would straddle nodes.
    """
    if not experts:
        if asked not in ("auto", 1):
            raise UserError(f"expert_parallel is {asked}, but the model has no experts; use 1")
        return 1
    if asked == "auto":
        divided = (world_size, local_size, *experts)
        fitting = [n for n in range(1, local_size + 1) if all(number % n == 0 for number in divided)]
        return max(fitting)
    degree = int(asked)
    for count in experts:
        if count % degree:
            raise UserError(f"{count} experts do not divide by expert_parallel ({degree}); use {divisors(count)}")
    check_groups("expert_parallel", degree, world_size, local_size)
    return degree


def place_experts(model: nn.Module, degree: int, rank: int) -> None:
    """Let each mixture of a model on the meta device hold only the experts of this rank, and mark their parameters.

    With degree 1 experts are parameters like all others. The marks are what DeepSpeed reads to keep experts out of the
    data-parallel average and, under ZeRO-3, to partition them over the expert-data group.
    """
    for layer in model.modules():
        if isinstance(layer, MixtureOfExperts) and degree == 1:
            layer.dispatcher = ReplicatedExperts()
        elif isinstance(layer, MixtureOfExperts):
            layer.dispatcher = AllToAllDispatcher(layer.spec.experts, degree, rank)
            held = layer.dispatcher.num_local_experts
            for module in layer.experts.modules():
                if isinstance(module, GroupedLinear):
                    module.keep_experts(held * layer.dispatcher.ep_rank, held)
                    for parameter in module.parameters(recurse=False):
                        parameter.allreduce = False  # type: ignore[attr-defined]
                        parameter.group_name = layer.dispatcher.ep_group_name  # type: ignore[attr-defined]
                        parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
                        parameter.ds_zero_partition_group_name = layer.dispatcher.ep_group_name  # type: ignore[attr-defined]
