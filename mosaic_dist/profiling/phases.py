"""The time of training steps by part of the model, forward and backward, out of torch's profiler.

Ranges are put around the parts while they run forward. What the backward pass does is told by the number that autograd
gives each operation: the operation that undoes another has the same. Parts that run again in the backward pass count
there, to the part that they are.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.autograd import DeviceType
from torch.profiler import record_function

from mosaic_dist.model import MixtureOfExperts
from mosaic_dist.model.block import BlockModule
from mosaic_dist.parallel import Engine

PREFIX = "phase: "
BACKWARD = "autograd::engine::evaluate_function: "
STEP = PREFIX + "rest of the step"
UPDATE = "clipping and update"
GRADIENTS = "gradients"
"""Adding up and reducing them, which belongs to no part."""


class Spent(NamedTuple):
    """Seconds of all profiled steps."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Of both."""
        return self.forward + self.backward


class Ranges:
    """Ranges that modules open and close while they run."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def enter(self, phase: str) -> None:
        """Begin a range within the one that is open."""
        opened = record_function(PREFIX + phase)
        opened.__enter__()
        self._open.append(opened)

    def leave(self) -> None:
        """End the newest one."""
        self._open.pop().__exit__(None, None, None)


@contextlib.contextmanager
def marked(engine: Engine) -> Iterator[Ranges]:
    """Every part of the engine's model opens its range when it runs, and the update its own, until the end."""
    ranges, hooks = Ranges(), []
    model: Any = engine.model
    parts: dict[nn.Module, str] = {model.embedding: "embedding", model.position: "embedding"}
    for module in model.modules():
        if isinstance(module, BlockModule):
            has_experts = isinstance(module.ffn, MixtureOfExperts)
            parts[module] = "compiled" if engine.is_compiled else "norms and residuals"
            if not engine.is_compiled:  # inside of compiled code there are no parts to tell
                parts[module.attention] = "attention"
            if has_experts or not engine.is_compiled:
                parts[module.ffn] = "mixture of experts" if has_experts else "feed-forward"
    for module, phase in parts.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, phase=phase: ranges.enter(phase)))
        hooks.append(module.register_forward_hook(lambda *_: ranges.leave()))
    hooks.append(model.norm.register_forward_pre_hook(lambda *_: ranges.enter("head and loss")))
    hooks.append(model.register_forward_hook(lambda *_: ranges.leave()))  # the head and the loss are its last words
    before = engine.before_update

    def begin_update() -> None:
        before()
        ranges.enter(UPDATE)

    engine.before_update = begin_update
    try:
        yield ranges
    finally:
        engine.before_update = before
        for hook in hooks:
            hook.remove()


def spent(events: Any, on_device: bool) -> dict[str, Spent]:
    """Seconds by phase, the most first, out of a profiler's events: of a device's kernels, or of the CPU's operations.

    Only what lies within the ranges STEP counts. Operations that wait for threads of their own count with the wait.
    """
    undone = {
        event.sequence_nr: phase
        for event in sorted(events, key=lambda event: event.time_range.start)
        if event.sequence_nr >= 0 and (phase := _range_of(event)) not in (None, STEP) and not _is_backward(event)
    }
    seconds: dict[tuple[str, bool], float] = defaultdict(float)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue  # kernels count with the operation that launched them, and a device has copies of the ranges
        took = event.self_device_time_total if on_device else event.self_cpu_time_total
        phase, is_backward = _place(event, undone)
        if took and phase is not None:
            seconds[phase.removeprefix(PREFIX), is_backward] += took / 1e6
    phases = {phase for phase, _ in seconds}
    found = {phase: Spent(seconds[phase, False], seconds[phase, True]) for phase in phases}
    return dict(sorted(found.items(), key=lambda item: -item[1].total))


def step_seconds(events: Any) -> float:
    """Seconds of all profiled steps together."""
    return sum(event.cpu_time_total for event in events if event.name == STEP) / 1e6


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _range_of(event: Any) -> str | None:
    """The innermost range around an event."""
    return next((one.name for one in _ancestors(event) if one.name.startswith(PREFIX)), None)


def _is_backward(event: Any) -> bool:
    return any(one.name.startswith(BACKWARD) for one in _ancestors(event))


def _place(event: Any, undone: dict[int, str]) -> tuple[str | None, bool]:
    """The phase of an event and whether it is part of the backward pass; no phase outside of the steps."""
    for one in _ancestors(event):
        if one.name.startswith(PREFIX) and one.name != STEP:
            return one.name, _is_backward(one)
        if one.name.startswith(BACKWARD):
            return undone.get(one.sequence_nr, PREFIX + GRADIENTS), True
        if one.name == STEP:
            return STEP, False
    return None, False
