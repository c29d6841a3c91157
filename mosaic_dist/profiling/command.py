"""`python -m mosaic_dist profile`: some training steps of a recipe under torch's profiler."""

import contextlib
from collections.abc import Callable, Iterator
from json import dumps
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from mosaic_dist.errors import UserError
from mosaic_dist.model import check_compiler
from mosaic_dist.parallel import (
    Engine,
    join_world,
    leave_world,
    local_size_from_environment,
    size_from_environment,
)
from mosaic_dist.plan.command import load_recipe
from mosaic_dist.profiling.phases import STEP, Spent, marked, spent, step_seconds
from mosaic_dist.run import resolve
from mosaic_dist.run_spec import Run
from mosaic_dist.spec import Positive, override

TRACE, MEMORY = "trace.json.gz", "memory.pickle"
MEMORY_EVENTS = 1_000_000
"""The newest that are kept, about 100 MB of them."""


def profile(
    *recipe: str,
    ds_config: str | None = None,
    output: str = "runs/profile",
    steps: Positive = 3,
    warmup: Positive = 2,
    memory_history: bool = False,
    json: bool = False,
    local_rank: int | None = None,  # the deepspeed launcher's own word
    **overrides: Any,
) -> None:
    """Tell where the time of a training step goes: attention, experts, loss, gradients, update; forward and backward.

    `profile recipes/t4_moe.py`, by itself or with a launcher: `torchrun -m mosaic_dist profile ...`. Trains on random
    tokens, so reading data is left out. Any field of the run is changed by its path.

    --ds_config FILE      DeepSpeed JSON (ds_configs/); without it ZeRO stage 1
    --output DIR          folder for the trace of rank 0, for chrome://tracing or ui.perfetto.dev
    --steps N             that are profiled
    --warmup N            steps before
    --memory_history      write who holds a GPU's memory, too: memory.pickle of rank 0, for pytorch.org/memory_viz
    --json                for programs
    """
    if len(recipe) != 1:
        raise UserError("give one recipe, as `profile recipes/t4_moe.py`")
    if memory_history and not torch.cuda.is_available():
        raise UserError("--memory_history is of a GPU's memory, and torch sees no GPU here; leave it out")
    run = override(load_recipe(str(recipe[0])), overrides)
    resolved = resolve(run, ds_config, size_from_environment(), local_size_from_environment())
    if run.parallel.compile:
        check_compiler(torch.cuda.is_available())
    folder = made_folder(output)
    world = join_world(run.parallel.timeout_seconds)
    engine = Engine(
        run.model, run.optimizer, resolved.config, resolved.expert_parallel, run.seed, world, parallel=run.parallel
    )
    history = folder / MEMORY if memory_history and world.is_main else None

    def step() -> None:
        tokens_BT = torch.randint(
            run.model.vocab_size, (run.batch_sequences // engine.sequences.data_ranks, run.seq_len + 1)
        )
        engine.train_step(tokens_BT[:, :-1], tokens_BT[:, 1:], run.optimizer.learning_rate / 100)

    for _ in range(warmup):
        step()
    with memory_recorded(history):
        profiler = profile_steps(engine, step, steps)
    if world.is_main:
        profiler.export_chrome_trace(str(folder / TRACE))
        phases, whole = spent(profiler.events(), world.device.type == "cuda"), step_seconds(profiler.events())
        print(dumps(figures(phases, whole, steps), indent=2) if json else table(run, phases, whole, steps))
        print(*filter(None, [folder / TRACE, history]), sep="\n")
    leave_world()


def profile_steps(engine: Engine, step: Callable[[], object], steps: int) -> torch_profile:
    """The profiler after so many steps of an engine, with the ranges that `spent` wants."""
    is_cuda = engine.world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with marked(engine) as ranges, torch_profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                step()
                ranges.leave()  # the update's, which has ended with the step
                if is_cuda:
                    torch.cuda.synchronize()
    return profiler


def made_folder(output: str) -> Path:
    """The folder, which is there now. Raises UserError where it cannot be one."""
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be a folder: {error.strerror}") from None
    return folder


@contextlib.contextmanager
def memory_recorded(path: Path | None) -> Iterator[None]:
    """Record who takes and gives back memory of the GPU, with the stack of each, into a file; None: do not."""
    if path is None:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def figures(phases: dict[str, Spent], whole: float, steps: int) -> dict[str, Any]:
    """Seconds per step, for programs."""
    told = {phase: {"forward": s.forward / steps, "backward": s.backward / steps} for phase, s in phases.items()}
    return {"step_seconds": whole / steps, "phases": told}


def table(run: Run, phases: dict[str, Spent], whole: float, steps: int) -> str:
    """Milliseconds per step by phase, for people."""
    rows = [f"{'ms per step':<24} {'forward':>10} {'backward':>10} {'share':>7}"]
    for phase, seconds in phases.items():
        forward, backward = (1e3 * part / steps for part in seconds)
        rows.append(f"{phase:<24} {forward:>10.1f} {backward:>10.1f} {seconds.total / whole:>7.1%}")
    idle = max(0.0, whole - sum(seconds.total for seconds in phases.values()))
    rows.append(f"{'waiting':<24} {1e3 * idle / steps:>10.1f} {'':>10} {idle / whole:>7.1%}")
    rate = run.batch_tokens * steps / whole
    rows.append(f"{'a step':<24} {1e3 * whole / steps:>10.1f} {'':>10} {rate:>7,.0f} tokens/s under the profiler")
    return "\n".join(rows)
