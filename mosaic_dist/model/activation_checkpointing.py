"""Activation checkpointing: parts of the model keep their inputs only and run again in the backward pass.

Chen et al., arXiv 1604.06174. What a part decides (which experts a token goes to) is decided once: `remembered` keeps
the first answer for the second run, so that rounding, ties or noise cannot route a token to another expert.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mosaic_dist.spec import Positive, Spec


class ActivationCheckpointing(Spec):
    """Which parts of which blocks run again in the backward pass.

    "full": whole blocks; "attention", "ffn": these parts of them; "moe": the feed-forward networks that have experts.
    `every` n: of the blocks only the first of each n.
    """

    parts: Literal["none", "full", "attention", "ffn", "moe"] = "none"
    every: Positive = 1

    def parts_of(self, i: int) -> str:
        """Those of block i."""
        return "none" if i % self.every else self.parts


def apply_activation_checkpointing(model: nn.Module, spec: ActivationCheckpointing) -> None:
    """Make the parts of a `TransformerModel` that `spec` names recompute while it trains. Values do not change."""
    for i, block in enumerate(model.layers):  # type: ignore[arg-type]
        parts, has_experts = spec.parts_of(i), hasattr(block.ffn, "router")
        if parts == "none" or (parts == "moe" and not has_experts):
            continue
        part = {"full": block, "attention": block.attention, "ffn": block.ffn, "moe": block.ffn}[parts]
        part.forward = Recomputed(part.forward)


class Recomputed:
    """A module's forward that keeps its inputs only. As an attribute of the instance it leaves all names alone."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """As the wrapped forward."""
        return recomputed(self.forward, *inputs, **named)


def recomputed(part: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """What `part` gives for the inputs, of which nothing is kept for the backward pass but the inputs."""
    if not torch.is_grad_enabled():
        return part(*inputs, **named)
    decisions: list[Any] = []
    return checkpoint(
        part,
        *inputs,
        use_reentrant=False,
        # shapes of parameters differ between the two runs under ZeRO-3, which gathers them for each
        determinism_check="none",
        context_fn=lambda: (_noting(decisions), _repeating(decisions)),
        **named,
    )


_answer: ContextVar[Callable[[Callable[[], Any]], Any] | None] = ContextVar("answer", default=None)


def remembered(decide: Callable[[], Any]) -> Any:
    """What `decide` gives; in a second run of the same part, what it gave in the first."""
    answer = _answer.get()
    return decide() if answer is None else answer(decide)


@contextlib.contextmanager
def _answering(answer: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    token = _answer.set(answer)
    try:
        yield
    finally:
        _answer.reset(token)


def _noting(decisions: list[Any]) -> contextlib.AbstractContextManager[None]:
    def note(decide: Callable[[], Any]) -> Any:
        decisions.append(decide())
        return decisions[-1]

    return _answering(note)


def _repeating(decisions: list[Any]) -> contextlib.AbstractContextManager[None]:
    again = iter(decisions)
    return _answering(lambda decide: next(again))
