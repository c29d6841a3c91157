"""Expert parallelism: the experts of a layer spread over the ranks of DeepSpeed's expert groups.

`ExpertExchange` replaces the identity exchange of a mixture-of-experts layer: rows travel to the rank that holds
their expert with one all-to-all, and back with another; a first, small one tells everybody how many rows to expect.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor, nn

from mosaic_dist.errors import UserError
from mosaic_dist.model import GroupedLinear, MixtureOfExperts


class AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group by counts; the gradient takes the same way back. Every rank of it must call."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        """Send `send[w]` rows to rank w of the group, receive `receive[w]` from it."""
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out_RD = rows_RD.new_empty(sum(receive), rows_RD.shape[1])
        dist.all_to_all_single(out_RD, rows_RD.contiguous(), receive, send, group=group)
        return out_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        """The reverse."""
        out_RD = grad_RD.new_empty(sum(ctx.send), grad_RD.shape[1])
        dist.all_to_all_single(out_RD, grad_RD.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out_RD, None, None, None


class Plan(NamedTuple):
    """How rows came here, so that results can go back."""

    send: list[int]
    receive: list[int]
    order_R: Tensor
    """Permutation from (source rank, expert) order to expert order."""


class ExpertExchange(AutoEPMoELayer):
    """See the module's text; the interface is `LocalExchange`'s.

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

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor) -> tuple[Tensor, list[int], Plan]:
        """See `LocalExchange.dispatch`. Every rank of the expert group must call, also with no rows."""
        counts_We = counts_E.view(self.ep_size, -1)
        arriving_We = torch.empty_like(counts_We)
        dist.all_to_all_single(arriving_We, counts_We.contiguous(), group=self.group)
        # one transfer to the host for all that it must know
        both_2We = torch.stack([counts_We, arriving_We]).tolist()
        send, receive = ([sum(row) for row in side] for side in both_2We)
        counts_e = [sum(column) for column in zip(*both_2We[1], strict=True)]
        rows_RD = AllToAll.apply(rows_RD, send, receive, self.group)
        expert_We = torch.arange(self.num_local_experts, device=rows_RD.device).repeat(self.ep_size)
        order_R = expert_We.repeat_interleave(arriving_We.flatten(), output_size=sum(receive)).argsort(stable=True)
        return rows_RD[order_R], counts_e, Plan(send, receive, order_R)

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor:
        """See `LocalExchange.combine`."""
        back_R = torch.empty_like(plan.order_R)
        back_R[plan.order_R] = torch.arange(len(back_R), device=back_R.device)
        return AllToAll.apply(rows_RD[back_R], plan.receive, plan.send, self.group)


def expert_counts(model: nn.Module) -> list[int]:
    """The number of experts of each layer that has some."""
    return [layer.spec.experts for layer in model.modules() if isinstance(layer, MixtureOfExperts)]


def choose_degree(asked: int | str, experts: list[int], world_size: int, local_size: int) -> int:
    """The expert-parallel degree: `asked`, or for "auto" the largest that divides the experts and fits in a node.

    Raises UserError where experts or ranks do not divide by the degree.
    """
    if not experts:
        if asked not in ("auto", 1):
            raise UserError(f"expert_parallel is {asked}, but the model has no experts; use 1")
        return 1
    if asked == "auto":
        fitting = [n for n in range(1, local_size + 1) if world_size % n == 0 and all(e % n == 0 for e in experts)]
        return max(fitting)
    degree = int(asked)
    for count in experts:
        if count % degree:
            raise UserError(f"{count} experts do not divide by expert_parallel ({degree}); use {_divisors(count)}")
    if world_size % degree:
        raise UserError(f"{world_size} ranks do not divide by expert_parallel ({degree}); use {_divisors(world_size)}")
    return degree


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def place_experts(model: nn.Module, degree: int, rank: int) -> None:
    """Let each mixture of a model on the meta device hold only the experts of this rank, and mark their parameters.

    With degree 1 nothing changes: experts are parameters like all others. The marks are what DeepSpeed reads to keep
    experts out of the data-parallel average and, under ZeRO-3, to partition them over the expert-data group.
    """
    if degree == 1:
        return
    for layer in model.modules():
        if isinstance(layer, MixtureOfExperts):
            layer.exchange = ExpertExchange(layer.spec.experts, degree, rank)
            held = layer.exchange.num_local_experts
            for module in layer.experts.modules():
                if isinstance(module, GroupedLinear):
                    module.keep_experts(held * layer.exchange.ep_rank, held)
                    for parameter in module.parameters(recurse=False):
                        parameter.allreduce = False  # type: ignore[attr-defined]
                        parameter.group_name = layer.exchange.ep_group_name  # type: ignore[attr-defined]
                        parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
                        parameter.ds_zero_partition_group_name = layer.exchange.ep_group_name  # type: ignore[attr-defined]
