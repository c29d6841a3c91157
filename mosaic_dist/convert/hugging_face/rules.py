"""Name and layout maps between our tensors and Hugging Face's: one table of rules serves both directions.

A `Rule` binds a few tensors of ours to a few of theirs by a `Layout`, a pair of functions that undo each other without
arithmetic. So a round trip is exact to the bit, and memory is bounded by the tensors of one rule.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mosaic_dist.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
LISTED_NAMES = 8


class Layout(NamedTuple):
    """How the values of a rule's tensors lie: theirs -> ours, and back."""

    to_ours: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    to_theirs: Callable[[Sequence[Tensor]], Sequence[Tensor]]


AS_IS = Layout(lambda theirs: theirs, lambda ours: ours)

TRANSPOSED = Layout(lambda theirs: [theirs[0].mT], lambda ours: [ours[0].mT])
"""GPT-2's Conv1D keeps [inputs, outputs]."""

FUSED = Layout(
    lambda theirs: [part.mT if part.ndim == 2 else part for part in theirs[0].chunk(3, -1)],
    lambda ours: [torch.cat([part.mT if part.ndim == 2 else part for part in ours], -1)],
)
"""GPT-2's c_attn: query, key and value side by side, weight [inputs, 3 * outputs] or bias [3 * outputs]."""

STACKED = Layout(
    lambda theirs: [torch.stack([weight.mT for weight in theirs])],
    lambda ours: [weight.mT for weight in ours[0].unbind()],
)
"""A matrix [outputs, inputs] per expert there, one stack [experts, inputs, outputs] here."""

INTERLEAVED = Layout(
    lambda theirs: [theirs[0][..., 0::2], theirs[0][..., 1::2]],
    lambda ours: [torch.stack(list(ours), -1).flatten(-2)],
)
"""gpt-oss: gate and up take turns in the last dimension."""


def neighbour_pairs(heads: int, plain: int, rotary: int) -> Layout:
    """Rotary dimensions 2i and 2i + 1 are paired there, i and i + rotary / 2 here.

    For a weight [heads * (plain + rotary), inputs] whose rows are, head by head, position-free ones and then rotary
    ones. Queries and keys are reordered alike, so their products stay.
    """
    ours_from = torch.cat([torch.arange(0, rotary, 2), torch.arange(1, rotary, 2)])
    order = torch.cat([torch.arange(plain), plain + ours_from])

    def reorder(weight: Tensor, rows: Tensor) -> Tensor:
        return weight.unflatten(0, (heads, plain + rotary))[:, rows.to(weight.device)].flatten(0, 1)

    back = order.argsort()
    return Layout(lambda theirs: [reorder(theirs[0], order)], lambda ours: [reorder(ours[0], back)])


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors `ours` hold the values of tensors `theirs`."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout = AS_IS


def same(ours: str, theirs: str, layout: Layout = AS_IS) -> Rule:
    """The rule for one tensor on either side."""
    return Rule((ours,), (theirs,), layout)


def their_shapes(rules: Iterable[Rule], our_shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all their tensors, from ours."""
    found: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        ours = [torch.empty(our_shapes[name], device="meta") for name in rule.ours]
        found |= {name: tuple(t.shape) for name, t in zip(rule.theirs, rule.layout.to_theirs(ours), strict=True)}
    return found


def to_ours(rules: Sequence[Rule], our_shapes: Shapes, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their tensors -> ours, rule by rule. Names are checked at once, shapes as tensors are read; UserError."""
    assert {name for rule in rules for name in rule.ours} == set(our_shapes), "the rules do not cover the model"
    shapes = their_shapes(rules, our_shapes)
    check_names(shapes, tensors)
    return _convert([(rule.theirs, rule.ours, rule.layout.to_ours) for rule in rules], shapes, tensors)


def to_theirs(rules: Sequence[Rule], our_shapes: Shapes, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our tensors -> theirs; otherwise as `to_ours`."""
    assert {name for rule in rules for name in rule.ours} == set(our_shapes), "the rules do not cover the model"
    check_names(our_shapes, tensors)
    return _convert([(rule.ours, rule.theirs, rule.layout.to_theirs) for rule in rules], our_shapes, tensors)


def check_names(expected: Iterable[str], found: Iterable[str]) -> None:
    """UserError that lists the tensors which are missing and those which the model has no place for."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise UserError(f"the weights are not this model's: missing {_listed(missing)}; extra {_listed(extra)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more if names else "none"


def _convert(
    steps: list[tuple[tuple[str, ...], tuple[str, ...], Callable[[Sequence[Tensor]], Sequence[Tensor]]]],
    shapes: Shapes,
    tensors: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    for sources, results, convert in steps:
        loaded = [tensors[name] for name in sources]
        for name, tensor in zip(sources, loaded, strict=True):
            if tuple(tensor.shape) != shapes[name]:
                raise UserError(f"{name} is {list(tensor.shape)} among the weights, {list(shapes[name])} in the model")
        for name, tensor in zip(results, convert(loaded), strict=True):
            yield name, _own(tensor)
        del loaded, tensor  # before the next rule's are read


def _own(tensor: Tensor) -> Tensor:
    """Contiguous, with a storage that holds nothing else: safetensors refuses views of one storage."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
