"""Where ZeRO 1, 2 and 3 put the elements of each parameter: stretches of flat float32 tensors, one on each rank."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION, DeepSpeedEngine
from torch import Tensor, nn


class FlatSlice(NamedTuple):
    """Elements [start, start + length) of a flattened parameter begin at `offset` of a rank's flat tensor."""

    start: int
    length: int
    offset: int


class Partition(NamedTuple):
    """A flattened parameter in something longer that is cut over the ranks of a group, `share` elements to each."""

    shape: tuple[int, ...]
    """Of what each of these ranks would hold without ZeRO."""
    share: int
    before: int
    """Elements of what is cut before the parameter."""
    flat_before: int
    """Elements of each flat tensor before its share."""

    def part(self, rank: int) -> FlatSlice | None:
        """What a rank of the group holds of the parameter, if anything."""
        low = rank * self.share
        begin, end = max(low, self.before), min(low + self.share, self.before + math.prod(self.shape))
        if begin >= end:
            return None
        return FlatSlice(begin - self.before, end - begin, self.flat_before + begin - low)

    def ranks_of(self, start: int, stop: int) -> range:
        """The ranks of the group that hold elements [start, stop) of the parameter."""
        return range((self.before + start) // self.share, (self.before + stop - 1) // self.share + 1)


class Partitioned(NamedTuple):
    """A parameter that ZeRO has cut."""

    parameter: nn.Parameter
    flat: Tensor
    """This rank's float32 tensor, which is what the optimizer updates. The parameter lies alike in those of others."""
    group: Any
    """The ranks that hold the parameter together."""
    cut: Partition


@contextlib.contextmanager
def zero_optimizer_in_bfloat16() -> Iterator[None]:
    """Engines that are made in here have ZeRO's own optimizer at stage 1, too, with float32 sums of bfloat16 gradients.

    DeepSpeed (0.19) would take its BF16_Optimizer, which cannot skip an update: it fails an assertion where a gradient
    is not finite.
    """
    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def choose_zero(engine: DeepSpeedEngine, optimizer: Any) -> str | None:
        chosen = choose(engine, optimizer)
        return ZERO_OPTIMIZATION if chosen == BFLOAT16 else chosen

    DeepSpeedEngine._do_optimizer_sanity_check = choose_zero
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


def drop_summed_gradients(zero: Any) -> None:
    """Forget what ZeRO 1 or 2 has summed for an update that it left out.

    With offload DeepSpeed (0.19) would add the next step's gradients to float32 sums that are not finite, and leave out
    every update from then on.
    """
    zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))


def partitioned_parameters(zero: Any, stage: int) -> Iterator[Partitioned]:
    """All parameters that a ZeRO optimizer of DeepSpeed (0.19) keeps, of stage 1, 2 or 3."""
    return _of_flat_groups(zero) if stage in (1, 2) else _of_pieces(zero)


def _of_flat_groups(zero: Any) -> Iterator[Partitioned]:
    """ZeRO 1 and 2: each group of parameters is one flat tensor, cut evenly over the ranks of its group."""
    for i, flat in enumerate(zero.single_partition_of_fp32_groups):
        group, share = zero.real_dp_process_group[i], zero.partition_size[i]
        for parameter, before in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
            yield Partitioned(parameter, flat, group, Partition(tuple(parameter.shape), share, before, 0))


def _of_pieces(zero: Any) -> Iterator[Partitioned]:
    """ZeRO 3: each parameter is cut over the ranks of its group; the pieces of a sub-group lie in one flat tensor."""
    for sub_group in zero.fp16_groups:
        for parameter in sub_group:
            index, flat_before, _ = zero.grad_position[zero.get_param_id(parameter)]
            cut = Partition(tuple(parameter.ds_shape), parameter.ds_tensor.ds_numel, 0, flat_before)
            yield Partitioned(parameter, zero.fp32_partitioned_groups_flat[index], parameter.ds_process_group, cut)
