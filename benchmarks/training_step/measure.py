"""Times, memory, the products' ceiling, and where our step's time goes."""

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training_step.cases import Case
from benchmarks.training_step.contenders import Contender, Precision, makers
from mosaic_dist.model.count import flops_per_token
from mosaic_dist.parallel import World
from mosaic_dist.plan.recorder import Recorder
from mosaic_dist.profiling.command import profile_steps
from mosaic_dist.profiling.phases import spent, step_seconds

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROFILED_STEPS = 2
CEILING_SHARE, CEILING_REPEATS = 0.9, 5


class Memory(NamedTuple):
    """Bytes of a contender's tensors."""

    state: int
    """Between steps: weights, optimizer states, buckets."""
    peak: int
    """At most at a time, in a step that begins with them."""


class Batches:
    """Random tokens, the same ones for each contender."""

    def __init__(self, case: Case):
        chance = torch.Generator().manual_seed(1)
        shape = (case.run.micro_batch, case.run.seq_len + 1)
        tokens_BT = torch.randint(case.run.model.vocab, shape, generator=chance)
        self.inputs_BT, self.targets_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()

    def step(self, contender: Contender) -> float:
        """The loss of a step on them, which has ended."""
        return contender.step(self.inputs_BT, self.targets_BT)


class Entrant(NamedTuple):
    """A contender in its best precision, with what its trial told."""

    contender: Contender
    precision: Precision
    losses: list[float]
    """Of its first steps."""
    memory: Memory
    tried: dict[str, float]
    """Seconds of a step in each precision that was tried."""


def measure(case: Case, precisions: tuple[Precision, ...], rounds: int, world: World) -> dict[str, Any]:
    """All figures of a case, as the JSON has them."""
    batches = Batches(case)
    ring = {name: _try(case, name, precisions, batches, world) for name in makers(case)}
    seconds = time_rounds({name: entrant.contender for name, entrant in ring.items()}, batches, rounds, world)
    products = multiplied(ring["ours"].contender, batches)
    used = {entrant.precision for entrant in ring.values()}
    ceilings = {name: ceiling(products, DTYPES[name], world) for name in sorted(used)}
    flops = flops_per_token(case.run.model, case.run.seq_len) * case.tokens
    rows = {}
    for name, entrant in ring.items():
        median = statistics.median(seconds[name])
        rows[name] = {
            "precision": entrant.precision,
            "parameters": entrant.contender.parameters,
            "seconds": median,
            "all_seconds": seconds[name],
            "tokens_per_second": case.tokens / median,
            "tflops": flops / median / 1e12,
            "mfu": flops / median / ceilings[entrant.precision],
            "state_bytes": entrant.memory.state,
            "peak_bytes": entrant.memory.peak,
            "losses": entrant.losses,
            "tried_seconds": entrant.tried,
        }
    return {
        "recipe": case.recipe,
        "said": case.said,
        "twin": case.config["model_type"],
        "layers": len(case.run.model.blocks),
        "dim": case.run.model.dim,
        "vocab": case.run.model.vocab,
        "seq_len": case.run.seq_len,
        "micro_batch": case.run.micro_batch,
        "flops": flops,
        "ceiling_tflops": {name: rate / 1e12 for name, rate in ceilings.items()},
        "times": times(seconds),
        "best_peer": best_peer(seconds),
        "contenders": rows,
        "phases": phases(ring["ours"].contender, batches, world),
    }


def _try(case: Case, name: str, precisions: tuple[Precision, ...], batches: Batches, world: World) -> Entrant:
    """Two steps in each precision under the count of bytes, and one for its time; who was slower is gone."""
    best: Entrant | None = None
    tried: dict[str, float] = {}
    for precision in precisions:
        make = makers(case)[name]
        contender, losses, memory = weighed(lambda: make(case, precision, world), batches, world)  # noqa: B023
        tried[precision] = timed(contender, batches, world)
        if best is None or tried[precision] < tried[best.precision]:
            best = Entrant(contender, precision, losses, memory, tried)
        del contender
        gc.collect()
    assert best is not None
    return best


# --- memory -------------------------------------------------------------------------------------------------------


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


# --- time ---------------------------------------------------------------------------------------------------------


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


def time_rounds(ring: dict[str, Contender], batches: Batches, rounds: int, world: World) -> dict[str, list[float]]:
    """Seconds of each contender in each round. Each round begins with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in ring}
    for turn in range(rounds):
        for name in rotated(list(ring), turn):
            seconds[name].append(timed(ring[name], batches, world))
    return seconds


def rotated(names: list[str], turn: int) -> list[str]:
    """The names, beginning with another one each turn."""
    first = turn % len(names)
    return names[first:] + names[:first]


def best_peer(seconds: dict[str, list[float]]) -> str:
    """Who is the fastest beside us."""
    return min((name for name in seconds if name != "ours"), key=lambda name: statistics.median(seconds[name]))


def times(seconds: dict[str, list[float]]) -> dict[str, float]:
    """How many times as many tokens we do in each peer's time: the median over the rounds, each by itself."""

    def ratio(name: str) -> float:
        return statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True))

    return {name: ratio(name) for name in seconds if name != "ours"}


# --- the products' ceiling ----------------------------------------------------------------------------------------


class Product(NamedTuple):
    """A matrix product by its operands: sizes and strides."""

    left: tuple[tuple[int, ...], tuple[int, ...]]
    right: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def flops(self) -> int:
        """Of one."""
        (rows, inner), (_, columns) = self.left[0], self.right[0]
        return 2 * rows * inner * columns


class Products(TorchDispatchMode):
    """Counts the matrix products inside a `with` block.

    Not those of attention, nor a GPU's grouped products: the ceiling is that of plain ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        first = {aten.mm: 0, aten.addmm: 1, aten.addmm_: 1}.get(func._overloadpacket)
        if first is not None:
            left, right = args[first : first + 2]
            self.found[Product((tuple(left.shape), left.stride()), (tuple(right.shape), right.stride()))] += 1
        return func(*args, **(kwargs or {}))


def multiplied(contender: Contender, batches: Batches) -> Counter[Product]:
    """The products of a step, the largest that make CEILING_SHARE of their operations."""
    with Products() as products:
        batches.step(contender)
    return dominant(products.found)


def dominant(found: Counter[Product]) -> Counter[Product]:
    """The kinds with the most operations, until they have CEILING_SHARE of all."""
    whole = sum(product.flops * times for product, times in found.items())
    kept: Counter[Product] = Counter()
    for product, times in sorted(found.items(), key=lambda item: -item[0].flops * item[1]):
        if sum(one.flops * often for one, often in kept.items()) >= CEILING_SHARE * whole:
            break
        kept[product] = times
    return kept


def ceiling(products: Counter[Product], dtype: torch.dtype, world: World) -> float:
    """Operations per second of these products alone, each as often as in a step, at their best of a few tries."""
    flops = sum(product.flops * times for product, times in products.items())
    return flops / sum(_seconds(product, dtype, world) * times for product, times in products.items())


def _seconds(product: Product, dtype: torch.dtype, world: World) -> float:
    left, right = (
        torch.empty_strided(*operand, dtype=dtype, device=world.device).fill_(0.5)
        for operand in (product.left, product.right)
    )

    def tries() -> Iterator[float]:
        for _ in range(CEILING_REPEATS):
            synchronize(world)
            started = time.perf_counter()
            torch.mm(left, right)
            synchronize(world)
            yield time.perf_counter() - started

    return min(tries())


# --- where our time goes ------------------------------------------------------------------------------------------


def phases(contender: Contender, batches: Batches, world: World) -> dict[str, float]:
    """Share of each phase of our step under the profiler; what lies between operations is the host's."""
    assert contender.engine is not None
    events = profile_steps(contender.engine, lambda: batches.step(contender), PROFILED_STEPS).events()
    found, whole = spent(events, world.device.type == "cuda"), step_seconds(events)
    shares = {name: seconds.total / whole for name, seconds in found.items()}
    return shares | {"waiting": max(0.0, 1 - sum(shares.values()))}
