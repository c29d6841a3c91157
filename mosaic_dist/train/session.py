"""One start of a run: claim the folder, continue or begin, train, leave everything in order."""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.data.mixture import Corpus, parts_of
from mosaic_dist.data.stream import Loader, ValidationBatches
from mosaic_dist.model import Counts, flops_per_token
from mosaic_dist.parallel import Engine, World, gather_problems, on_main
from mosaic_dist.run_spec import OWN_PARTS, Run
from mosaic_dist.spec import own_parts
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.initial import InitialWeights, fill, verify_together
from mosaic_dist.train.interruption import INTERRUPTED_EXIT_CODE, LOOK_SECONDS, Deadline, StopSignals
from mosaic_dist.train.lock import FolderInUse
from mosaic_dist.train.peak import peak_flops_per_second
from mosaic_dist.train.reporting import FirstStep, Metrics, Plots, ProgressBar, Speed
from mosaic_dist.train.resuming import newest_good, restore_run
from mosaic_dist.train.saving import Saver
from mosaic_dist.train.spikes import SpikeGuard
from mosaic_dist.train.telling import say
from mosaic_dist.train.trackers import Tracker, close_trackers, make_trackers
from mosaic_dist.train.trainer import Callback, HeldOutStream, NonfiniteGuard, Progress, Trainer, Validation
from mosaic_dist.train.watchdog import Watchdog

LEAVE_SECONDS = 300.0
"""Time that an earlier start has to end once its watchdog or its agent has noticed that SLURM gave it up."""


@dataclass(frozen=True)
class Start:
    """What a start of a run is made of, all of it checked already."""

    run: Run
    info: Corpus
    config: dict[str, Any]
    """A filled DeepSpeed config."""
    degree: int
    """The expert-parallel degree."""
    counts: Counts
    output: str
    """The run folder."""
    stop_at_step: int | None
    initial: InitialWeights | None
    """Where the run starts from without a checkpoint; None: from its seed."""
    deadline: Deadline
    signals: StopSignals


def train_run(start: Start, world: World) -> Trainer:
    """Train in the run's folder, from its newest checkpoint if it has one. Every rank calls.

    It may end before its last step by the deadline of the main process or a signal to any, and has saved then.
    """
    run, folder = start.run, RunFolder(start.output)
    if start.initial is not None:  # before the folder is claimed: a damaged file must leave nothing behind
        verify_together(start.initial, world)
        say(world, f"starting from the weights in {start.initial.path}")
    claim(folder, run, start.signals, world)
    torch.manual_seed(run.seed + world.rank)
    filled = None if start.initial is None else functools.partial(fill, weights=start.initial)
    engine = Engine(run.model, run.optimizer, start.config, start.degree, run.seed, world, filled, run.parallel)
    checkpoint = newest_good(folder, world)
    trainer = begin(run, start.info, engine, checkpoint, min(run.steps, start.stop_at_step or run.steps))
    peak, peak_source = peak_flops_per_second(world.device)
    facts = engine_facts(engine, start.counts) | {
        "flops_per_token": flops_per_token(run.model, run.seq_len),
        "peak_flops_per_second": peak,
        "peak_source": peak_source,
        OWN_PARTS: own_parts(run),
    }
    on_main(world, lambda: folder.describe(run, start.config, facts, start.info.tokenizer_path))
    say(world, how_it_begins(trainer, start.counts, folder))
    if not trainer.is_ending:
        trainer.reasons_to_stop = reasons_to_stop(world, start.deadline, start.signals)
        trackers = make_trackers(run, folder.path) if world.is_main else []
        saver = Saver(folder, start.deadline, trainer)
        watch = Watchdog(world, run.parallel.step_limit_seconds, folder.path)
        trainer.entered = watch.enter
        speed = Speed(facts["flops_per_token"], peak)
        try:
            trainer.train(make_hooks(trainer, folder, start.info, speed, saver, trackers))
        finally:
            watch.close()
            saver.close()
            close_trackers(trackers, [folder.loss_plot, folder.experts_plot])
        say(world, how_it_ended(trainer) + f"; see {folder.path}")
    start.signals.settle()
    return trainer


def claim(folder: RunFolder, run: Run, signals: StopSignals, world: World) -> None:
    """Claim the folder. Wait for an earlier start of the same SLURM job that still holds it. Every rank calls.

    The wait is longer than such a start can live: its own watchdog ends it, if `slurm/node.sh` has not done so before.
    """
    began, seconds = time.monotonic(), run.parallel.step_limit_seconds + LEAVE_SECONDS
    has_told = False
    while holder := on_main(world, lambda: folder.claim(run)):
        if not has_told:
            say(world, f"{folder.path} is still in use by {holder}: waiting up to {seconds:.0f} s for its end")
            has_told = True
        if gather_problems(signals.received):
            say(world, "stopped by a signal while waiting; nothing was changed")
            os._exit(INTERRUPTED_EXIT_CODE)  # all ranks are here; an orderly end has nothing to save
        if on_main(world, lambda: time.monotonic() - began > seconds):
            raise FolderInUse(f"{folder.path} is still in use by {holder} after {seconds:.0f} s; end that process")
        time.sleep(LOOK_SECONDS)


def how_it_begins(trainer: Trainer, counts: Counts, folder: RunFolder) -> str:
    """The model, the layout, and which steps are ahead, if any are."""
    engine, progress = trainer.engine, trainer.progress
    told = (
        f"{trainer.run.name}: {counts.total:,} parameters ({counts.active:,} active), "
        f"{trainer.run.dealt(engine.world.size)}, expert parallel {engine.degree}, ZeRO {engine.zero_stage}; "
        f"steps {progress.step} to {trainer.until_step} of {trainer.run.steps} in {folder.path}"
    )
    for kind, file in own_parts(trainer.run).items():
        told += f"\n{kind} is defined in {file}: commands that build this run's model need --recipe {file}"
    if not trainer.is_ending:
        compiles = trainer.run.parallel.compile
        return told + ("\ncompiling blocks in the first step: it may take minutes" if compiles else "")
    why = "was stopped early, by its validation loss" if progress.stopped_early else "is already there"
    return f"{told}\nnothing to do: the run {why}"


def reasons_to_stop(world: World, deadline: Deadline, signals: StopSignals) -> dict[str, Callable[[], bool]]:
    """What each rank is asked at the end of a step. The clock is the main process's alone."""
    return {
        "a signal": lambda: signals.received is not None,
        "--max_minutes": lambda: world.is_main and deadline.is_up(),
    }


def engine_facts(engine: Engine, counts: Counts) -> dict[str, Any]:
    """What a run folder tells of the layout that the run started in."""
    return {
        "world_size": engine.world.size,
        "expert_parallel": engine.degree,
        "sequence_parallel": engine.sequences.degree,
        "zero_stage": engine.zero_stage,
        "parameters": counts.total,
        "active_parameters": counts.active,
    }


def how_it_ended(trainer: Trainer) -> str:
    """Where this start of a run stopped, and why if it was early."""
    progress = trainer.progress
    where = f"step {progress.step}, {progress.tokens:,} tokens"
    if not trainer.has_arrived:
        return f"stopped by {trainer.interrupted_by}: {where}, saved; start again to go on to step {trainer.until_step}"
    if not progress.stopped_early:
        return f"done: {where}"
    loss, step = progress.best[0]
    return f"done: {where}, stopped early: the validation loss has not been below {loss:.4f} since step {step:.0f}"


def begin(run: Run, info: Corpus, engine: Engine, checkpoint: Checkpoint | None, until_step: int) -> Trainer:
    """A trainer at a checkpoint, or at the start."""
    progress, data_state = Progress(), None
    if checkpoint is not None:
        progress = restore_run(checkpoint, engine)
        data_state = checkpoint.state["data"]
    loader = Loader(
        run.data,
        info,
        seq_len=run.seq_len,
        global_batch=run.sequences_at,
        rank=engine.sequences.data_rank,
        world_size=engine.sequences.data_ranks,
        seed=run.seed,
        state=data_state,
        device=engine.world.device,
    )
    run.check_ramp(engine.world.size, loader.cursor)  # again: the newest checkpoint may have been passed over
    return Trainer(run, engine, loader, progress, until_step)


def held_out_streams(run: Run, info: Corpus, engine: Engine, samples: int | None) -> list[HeldOutStream]:
    """Held-out rows of each stream of the training data, at most `samples` (None: all), as batches of this rank."""
    parts = parts_of(info, run.data.split)
    whole = sum(part.proportion for part in parts)
    batches = functools.partial(
        ValidationBatches,
        run.data,
        batch=run.micro_batch_size,
        rank=engine.sequences.data_rank,
        world_size=engine.sequences.data_ranks,
        seq_len=run.seq_len,
        limit=samples,
        seed=run.seed,
        device=engine.world.device,
    )
    return [HeldOutStream(part.name, part.proportion / whole, batches(part.info)) for part in parts]


def make_hooks(
    trainer: Trainer, folder: RunFolder, info: Corpus, speed: Speed, saver: Saver, trackers: list[Tracker]
) -> list[Callback]:
    """What happens after each step, in this order. The main process alone reports."""
    run, world, step = trainer.run, trainer.engine.world, trainer.progress.step
    streams = functools.partial(held_out_streams, run, info, trainer.engine)
    held_out = streams(run.validation_samples or None) if run.validate_every_steps else []
    questions = streams(run.exact_match_samples) if run.exact_match_samples else []
    hooks: list[Callback] = [NonfiniteGuard(run.on_nonfinite_loss), Validation(held_out, questions)]
    if world.is_main:
        if run.parallel.compile:
            hooks.append(FirstStep())
        reports = (Metrics(folder, step, trackers, speed), ProgressBar(run, step, trainer.until_step, speed))
        hooks += reports
    trainer.has_gone_back = SpikeGuard(folder, saver, trainer, reports if world.is_main else ()).after_spike
    hooks.append(saver)
    if world.is_main:
        hooks.append(Plots(folder))
    return hooks
