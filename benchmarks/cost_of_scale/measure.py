"""Time and memory of the training steps of a case, in this process or on ranks of its own."""

import contextlib
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cost_of_scale.axes import Case, Cost
from mosaic_dist.optim import AdamW
from mosaic_dist.parallel import Engine, Parallel, World, fill_config, join_world, leave_world
from mosaic_dist.parallel.world import free_port
from mosaic_dist.plan.recorder import Recorder

Clock = Literal["wall", "cpu"]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
MEANT_SECONDS = 2.0
"""For the timed steps of a case, beyond the first of them."""
PATIENCE_SECONDS = 600.0
BUCKET_ELEMENTS = 1_000_000
"""DeepSpeed's own 500 million would be 2 GB that lie beside whatever is measured."""
OPTIMIZER = AdamW(learning_rate=1e-4)


def measure(case: Case, rounds: int, clock: Clock, world: World) -> Cost:
    """The cost of a step: best time of up to `rounds` steps, and bytes of one."""
    engine = build(case, world)
    generator = torch.Generator().manual_seed(world.rank)
    tokens_BT = torch.randint(case.model.vocab_size, (case.micro_batch_size, case.seq_len + 1), generator=generator)

    def step() -> None:
        engine.train_step(tokens_BT[:, :-1], tokens_BT[:, 1:], OPTIMIZER.learning_rate)

    step()  # makes the optimizer's states
    kept_bytes, peak_bytes = step_bytes(engine, step)
    seconds = timed(engine, step, rounds, CLOCKS[clock])
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return Cost(*slowest.tolist(), kept_bytes, peak_bytes)


def build(case: Case, world: World) -> Engine:
    """An engine under ZeRO-1 in float32."""
    config = fill_config(
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": BUCKET_ELEMENTS}},
        precision="fp32",
        micro_batch_size=case.micro_batch_size,
        accumulation=1,
        world_size=world.size,
        max_grad_norm=OPTIMIZER.max_grad_norm,
    )
    parallel = Parallel(activation_checkpointing=case.activation_checkpointing)
    return Engine(case.model, OPTIMIZER, config, case.expert_parallel, 0, world, parallel=parallel)


def timed(engine: Engine, step: Callable[[], None], rounds: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of forward and backward, and of the update: the least of each over the rounds."""
    begun = [0.0]
    parts: list[tuple[float, float]] = []
    began = time.perf_counter()
    with before_update(engine, lambda: begun.append(clock())):
        while not parts or (len(parts) < rounds and time.perf_counter() - began < MEANT_SECONDS):
            started = clock()
            step()
            parts.append((begun[-1] - started, clock() - begun[-1]))
            is_last = torch.tensor(float(time.perf_counter() - began >= MEANT_SECONDS))
            dist.all_reduce(is_last)  # all ranks take as many steps
            if is_last:
                break
    forward_backward, update = zip(*parts, strict=True)
    return min(forward_backward), min(update)


def step_bytes(engine: Engine, step: Callable[[], None]) -> tuple[int, int]:
    """Bytes that the forward pass leaves behind, and those of all tensors at the fullest moment of a step."""
    resident, recorder = resident_bytes(), Recorder("cpu")
    forward_ends = engine.model.register_forward_hook(lambda *_: recorder.mark("backward"))
    with before_update(engine, lambda: recorder.mark("update")), recorder:
        recorder.mark("forward")
        step()
    forward_ends.remove()
    peak, begin = 0, 0
    for phase in recorder.phases:
        peak, begin = max(peak, begin + phase.peak_bytes), begin + phase.change_bytes
    return recorder.phases[0].change_bytes, resident + peak


def resident_bytes() -> int:
    """Of all tensors that Python knows of."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextlib.contextmanager
def before_update(engine: Engine, action: Callable[[], None]) -> Iterator[None]:
    """Something is done between the backward pass and the update of each step."""
    original = engine.before_update

    def both() -> None:
        original()
        action()

    engine.before_update = both
    try:
        yield
    finally:
        engine.before_update = original


def measure_on_ranks(case: Case, rounds: int, clock: Clock) -> Cost:
    """The same on processes of their own, as many as the case has ranks; the bytes are those of the first rank."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    receiver, sender = context.Pipe(duplex=False)
    words = [(rank, port, case, rounds, clock, sender) for rank in range(case.ranks)]
    ranks = [context.Process(target=_rank, args=args) for args in words]
    for process in ranks:
        process.start()
    sender.close()  # the ranks' ends are left, so that the end of all of them is heard
    try:
        assert receiver.poll(PATIENCE_SECONDS), f"{case.ranks} ranks were not ready in {PATIENCE_SECONDS:.0f} s"
        return receiver.recv()
    finally:
        for process in ranks:
            process.join(10.0)
            process.kill()


def _rank(rank: int, port: int, case: Case, rounds: int, clock: Clock, sender: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks}
    os.environ.update({name: str(value) for name, value in (place | {"MASTER_PORT": port}).items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    world = join_world(PATIENCE_SECONDS)
    cost = measure(case, rounds, clock, world)
    if world.is_main:
        sender.send(cost)
    leave_world()
