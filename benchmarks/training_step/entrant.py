"""A contender at its place: built, weighed, and ready to step when its turn comes."""

import gc
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.training_step.cases import Case
from benchmarks.training_step.ceiling import ceiling, multiplied
from benchmarks.training_step.contenders import Contender, Precision, makers
from mosaic_dist.parallel import World
from mosaic_dist.plan.recorder import Recorder
from mosaic_dist.profiling.command import profile_steps
from mosaic_dist.profiling.phases import spent, step_seconds

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROFILED_STEPS = 2


class Memory(NamedTuple):
    """Bytes of a contender's tensors."""

    state: int
    """Between steps: weights, optimizer states, buckets."""
    peak: int
    """At most at a time, in a step that begins with them."""


class Told(NamedTuple):
    """What an entrant knows of itself before the rounds."""

    precision: Precision
    parameters: int
    losses: list[float]
    """Of its first steps."""
    memory: Memory
    seconds: float
    """Of one more step."""


class Batches:
    """Random tokens, the same ones for each contender."""

    def __init__(self, case: Case):
        chance = torch.Generator().manual_seed(1)
        shape = (case.run.micro_batch_size, case.run.seq_len + 1)
        tokens_BT = torch.randint(case.run.model.vocab_size, shape, generator=chance)
        self.inputs_BT, self.targets_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()

    def step(self, contender: Contender) -> float:
        """The loss of a step on them, which has ended."""
        return contender.step(self.inputs_BT, self.targets_BT)


class Entrant:
    """A contender that has made two steps under the count of bytes, and one for its time."""

    def __init__(self, case: Case, name: str, precision: Precision, world: World):
        self.batches, self.world = Batches(case), world
        make = makers(case)[name]
        self.contender, losses, memory = weighed(lambda: make(case, precision, world), self.batches, world)
        self.told = Told(precision, self.contender.parameters, losses, memory, self.step())

    def step(self) -> float:
        """Seconds of a step."""
        return timed(self.contender, self.batches, self.world)

    def ceiling(self, precision: Precision) -> float:
        """Operations per second of its own products alone."""
        products = multiplied(lambda: self.batches.step(self.contender))
        return ceiling(products, DTYPES[precision], self.world.device)

    def phases(self) -> dict[str, float]:
        """Share of each phase of our step under the profiler; what lies between operations is the host's."""
        assert self.contender.engine is not None
        step = lambda: self.batches.step(self.contender)  # noqa: E731
        events = profile_steps(self.contender.engine, step, PROFILED_STEPS).events()
        found, whole = spent(events, self.world.device.type == "cuda"), step_seconds(events)
        shares = {name: seconds.total / whole for name, seconds in found.items()}
        return shares | {"waiting": max(0.0, 1 - sum(shares.values()))}


def weighed(make: Callable[[], Contender], batches: Batches, world: World) -> tuple[Contender, list[float], Memory]:
    """A contender that has made two steps, their losses, and what it held: by the allocator, or counted on a CPU."""
    gc.collect()
    if world.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        contender = make()
        losses = [batches.step(contender)]
        gc.collect()
        state = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        losses.append(batches.step(contender))
        return contender, losses, Memory(state, torch.cuda.max_memory_allocated() - before)
    with Recorder("cpu") as recorder:
        recorder.mark("building and first step")
        contender = make()
        losses = [batches.step(contender)]
        gc.collect()
        state = recorder.live_bytes
        recorder.mark("step")
        losses.append(batches.step(contender))
    return contender, losses, Memory(state, state + recorder.phases[-1].peak_bytes)


def timed(contender: Contender, batches: Batches, world: World) -> float:
    """Seconds of a step. Whoever trains reads its loss at the end; a GPU is waited for all the same."""
    synchronize(world)
    started = time.perf_counter()
    batches.step(contender)
    synchronize(world)
    return time.perf_counter() - started


def synchronize(world: World) -> None:
    """Wait for a GPU."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
