"""What a rank sends in a step, by kind, and on which links.

Bytes "handed over" are what goes into each collective (for a gather, what comes out), which can be counted at the
calls. Bytes "sent" are what then leaves the rank: in a ring of n ranks 2 (n-1)/n of an all-reduce and (n-1)/n of a
reduce-scatter or gather (Patarasu and Yuan 2009); of an all-to-all what is not for the rank itself.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from mosaic_dist.parallel.cut_matrices import choose_workers, matrices_of, size
from mosaic_dist.parallel.partition import Partition
from mosaic_dist.plan.layout import Group, Layout, Span
from mosaic_dist.plan.microbatch import SHARERS, Microbatch
from mosaic_dist.plan.states import held, holders, is_persistent, padded, piece

SHARE_SENT = {"all-reduce": 2.0, "reduce-scatter": 1.0, "all-gather": 1.0, "all-to-all": 1.0}
"""Times (n-1)/n."""


class Flow(NamedTuple):
    """All collectives of one kind and purpose in a step."""

    kind: str
    what: str
    span: Span
    handed_over: float
    """Bytes of this rank."""

    @property
    def sent(self) -> float:
        """Bytes that leave the rank."""
        n = self.span.ranks
        return self.handed_over * SHARE_SENT[self.kind] * (n - 1) / n

    @property
    def sent_between(self) -> float:
        """Of these, bytes to other nodes; of a ring, shared out evenly over the ranks of a node."""
        n, in_node = self.span
        if n == in_node:
            return 0.0
        return self.handed_over * (n - in_node) / n if self.kind == "all-to-all" else self.sent / in_node

    @property
    def sent_inside(self) -> float:
        """Of these, bytes to ranks of the same node."""
        return self.sent - self.sent_between


def step_traffic(layout: Layout, groups: tuple[Group, ...], microbatch: Microbatch) -> list[Flow]:
    """The flows of a step, those of the losses and norms, a few bytes each, left out."""
    flows = [
        *_tokens(layout, microbatch),
        *_gradients(layout, groups),
        *_weights(layout, groups),
        *_matrices(layout, groups),
    ]
    return [flow for flow in flows if flow.handed_over and flow.span.ranks > 1]


def _tokens(layout: Layout, microbatch: Microbatch) -> Iterator[Flow]:
    """What a micro-batch sends: rows to experts and back, heads to where they are scored and back, and counts."""
    for (kind, group), (what, ranks) in {
        ("all-to-all", None): ("rows of tokens", layout.expert_group(0)),
        ("all-reduce", None): ("loads of experts", range(layout.ranks)),
        ("all-to-all", SHARERS): ("heads of attention", layout.sequence_group),
        ("all-reduce", SHARERS): ("loads in a micro-batch", layout.sequence_group),
    }.items():
        sent = {one: times for one, times in microbatch.sent.items() if (one.kind, one.group) == (kind, group)}
        each = sum(one.bytes * times for one, times in sent.items())
        yield Flow(kind, what, layout.span(ranks), each * layout.accumulation)


def _span(layout: Layout, group: Group) -> Span:
    return layout.span(layout.expert_data_group(0) if group.is_expert else range(layout.ranks))


def _by_span(layout: Layout, groups: tuple[Group, ...]) -> dict[tuple[str, Span], list[Group]]:
    found: dict[tuple[str, Span], list[Group]] = {}
    for group in groups:
        found.setdefault(("experts" if group.is_expert else "others", _span(layout, group)), []).append(group)
    return found


def _gradients(layout: Layout, groups: tuple[Group, ...]) -> Iterator[Flow]:
    """Stage 0 and 1 reduce them once a step, stages 2 and 3 with every micro-batch.

    DeepSpeed's stage 2 reduces by all-reduce, its default, though every rank needs but a part; stage 3 scatters.
    """
    times = layout.accumulation if layout.stage > 1 else 1
    for (whose, span), members in _by_span(layout, groups).items():
        if layout.stage == 3:
            elements = sum(piece(layout, group, n) * holders(layout, group) for group in members for n in group.sizes)
        else:
            elements = sum(group.elements for group in members)
        kind = "reduce-scatter" if layout.stage == 3 else "all-reduce"
        yield Flow(kind, f"gradients of {whose}", span, elements * layout.dtype.itemsize * times)


def _weights(layout: Layout, groups: tuple[Group, ...]) -> Iterator[Flow]:
    """Stages 1 and 2 gather what was updated; stage 3 gathers for each pass, and what stays whole after the update."""
    for (whose, span), members in _by_span(layout, groups).items():
        elements = 0.0
        if layout.stage in (1, 2):
            elements = sum(padded(layout, group) for group in members)
        elif layout.stage == 3:
            for group in members:
                for n, uses in zip(group.sizes, group.uses, strict=True):
                    times = 1 if is_persistent(layout, n) else layout.accumulation * gathers(layout, groups, uses)
                    elements += times * piece(layout, group, n) * holders(layout, group)
        yield Flow("all-gather", f"weights of {whose}", span, math.ceil(elements) * layout.dtype.itemsize)


def _matrices(layout: Layout, groups: tuple[Group, ...]) -> Iterator[Flow]:
    """Muon's matrices that ZeRO has cut: to the ranks that work on them, and back; the average of a rank."""
    for (whose, span), members in _by_span(layout, groups).items():
        itemsize = 2 if layout.precision == "bf16" else 4
        elements = sum(_travelling(layout, group) for group in members if group.by_muon and layout.stage)
        yield Flow("all-to-all", f"matrices of {whose}", span, 2 * elements * itemsize / span.ranks)


def _travelling(layout: Layout, group: Group) -> int:
    """Elements of a group's matrices that leave all its ranks together."""
    before = itertools.accumulate(group.sizes, initial=0)
    cuts = (
        Partition(shape, piece(layout, group, n), 0, 0)
        if layout.stage == 3
        else Partition(shape, held(layout, group), at, 0)
        for shape, n, at in zip(group.shapes, group.sizes, before, strict=False)
    )
    matrices = [matrix for cut in cuts for matrix in matrices_of(cut)]
    given = zip(matrices, choose_workers(matrices, holders(layout, group)), strict=True)
    return sum(size(place) for matrix, worker in given for rank, place in matrix.places.items() if rank != worker)


def gathers(layout: Layout, groups: tuple[Group, ...], uses: int) -> float:
    """How often stage 3 gathers a weight per micro-batch, on average: for each use in the forward and backward pass.

    Those that are needed again before so many elements of others, or that were prefetched, stay in between.
    """
    elements = sum(group.elements for group in groups)
    stay = max(layout.zero["stage3_max_reuse_distance"], layout.zero["stage3_prefetch_bucket_size"])
    return 1 + (2 * uses - 1) * (1 - min(1.0, stay / (2 * elements)))
