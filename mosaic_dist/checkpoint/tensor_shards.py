"""Pieces of tensors: what a rank hands over to be saved, and the proof that all pieces together are everything.

Every ZeRO x expert-parallel partition is an interval of a named, flattened global tensor, so a checkpoint is a set of
intervals and any other partition can be read back from it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from mosaic_dist.errors import UserError

MAX_PROBLEMS_TOLD = 5


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or is not what was written. Names the folder or file and what is wrong."""


class UnknownFormatError(CheckpointError):
    """A checkpoint that another version of this package wrote. It may be whole: never pass over or replace it."""


class TensorShard(NamedTuple):
    """The elements [start, start + len(data)) of one kind of one flattened global tensor.

    `tensor` is the global parameter name, `kind` what is stored of it ("master", "exp_avg", "buffer", ...), `data` is
    1-D, of any dtype that safetensors knows, on any device. An empty piece says only that the kind exists.
    """

    tensor: str
    kind: str
    start: int
    data: Tensor


class TensorSlice(NamedTuple):
    """A piece without its data: what the ranks tell each other before anything is written. `stop` is exclusive."""

    tensor: str
    kind: str
    start: int
    stop: int
    dtype: str
    rank: int


def merge_shapes(shapes: Iterable[Mapping[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """One table of global shapes from every rank's. Raises CheckpointError where two ranks disagree."""
    merged: dict[str, tuple[int, ...]] = {}
    for table in shapes:
        for name, shape in table.items():
            if merged.setdefault(name, shape) != shape:
                raise CheckpointError(f"ranks disagree on the shape of {name!r}: {merged[name]} and {shape}")
    return merged


def check_tiling(intervals: Iterable[TensorSlice], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the intervals of each (tensor, kind) cover every element exactly once, all in one dtype.

    A tensor of `shapes` of which nothing was given is a hole too. Raises CheckpointError with names and element
    numbers.
    """
    grouped: dict[tuple[str, str], list[TensorSlice]] = {}
    for interval in intervals:
        grouped.setdefault((interval.tensor, interval.kind), []).append(interval)
    given = {tensor for tensor, _ in grouped}
    problems = [f"{name!r} has a shape, {shapes[name]}, but no piece" for name in shapes if name not in given]
    for (tensor, kind), group in grouped.items():
        if tensor not in shapes:
            problems.append(f"{kind} of {tensor!r} has pieces but no shape")
            continue
        dtypes = sorted({interval.dtype for interval in group})
        if len(dtypes) > 1:
            problems.append(f"{kind} of {tensor!r} comes in several dtypes: {', '.join(dtypes)}")
        problems += _gaps_and_overlaps(f"{kind} of {tensor!r}", group, math.prod(shapes[tensor]))
    if problems:
        rest = len(problems) - MAX_PROBLEMS_TOLD
        told = problems[:MAX_PROBLEMS_TOLD] + ([f"and {rest} more"] if rest > 0 else [])
        raise CheckpointError(f"the pieces are not every element exactly once: {'; '.join(told)}")


def _gaps_and_overlaps(name: str, group: Sequence[TensorSlice], elements: int) -> list[str]:
    """Problems of one (tensor, kind), in words; element ranges are half open."""
    problems = []
    reached, writer = 0, -1
    for interval in sorted((i for i in group if i.stop > i.start), key=lambda i: (i.start, i.stop)):
        if interval.start < reached:
            twice = f"[{interval.start}, {min(reached, interval.stop)})"
            problems.append(f"{name}: elements {twice} come from rank {writer} and from rank {interval.rank}")
        if interval.start > reached:
            problems.append(f"{name}: elements [{reached}, {interval.start}) of {elements} come from no rank")
        if interval.stop > reached:
            reached, writer = interval.stop, interval.rank
    if reached < elements:
        problems.append(f"{name}: elements [{reached}, {elements}) of {elements} come from no rank")
    if reached > elements:
        problems.append(f"{name}: elements [{elements}, {reached}) of rank {writer} are beyond its {elements} elements")
    return problems
