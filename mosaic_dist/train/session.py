"""One start of a run: claim the folder, continue or begin, train, leave everything in order."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from mosaic_dist.checkpoint import Checkpoint, CheckpointError, candidates
from mosaic_dist.checkpoint.engine_state import load_engine
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.stream import Loader, ValidationBatches
from mosaic_dist.model import Counts, flops_per_token
from mosaic_dist.parallel import Engine, World, gather_problems, on_main
from mosaic_dist.run_spec import Run
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.initial import InitialWeights, fill, verify_together
from mosaic_dist.train.interruption import Deadline, StopSignals
from mosaic_dist.train.peak import peak_flops_per_second
from mosaic_dist.train.reporting import Metrics, Plots, ProgressBar, Speed
from mosaic_dist.train.saving import Saver
from mosaic_dist.train.telling import say
from mosaic_dist.train.trackers import make_trackers
from mosaic_dist.train.trainer import Hook, NonfiniteGuard, Progress, Trainer, Validation


def train_run(
    run: Run,
    info: DatasetInfo,
    config: dict[str, Any],
    degree: int,
    counts: Counts,
    output: str,
    stop_at_step: int | None,
    world: World,
    initial: InitialWeights | None = None,
    deadline: Deadline | None = None,
    signals: StopSignals | None = None,
) -> Trainer:
    """Train `run` in the folder `output`, from its newest checkpoint if it has one. Every rank calls.

    `config` is a filled DeepSpeed config and `degree` the expert-parallel degree. Where there is no checkpoint, the run
    starts from `initial`, or from its seed. It may end before its last step by the `deadline` of the main process or a
    signal to any, and has saved then.
    """
    deadline = deadline or Deadline(None)
    folder = RunFolder(output)
    if initial is not None:  # before the folder is claimed: a damaged file must leave nothing behind
        verify_together(initial, world)
        say(world, f"starting from the weights in {initial.path}")
    on_main(world, lambda: folder.claim(run))
    torch.manual_seed(run.seed + world.rank)
    filled = None if initial is None else functools.partial(fill, weights=initial)
    engine = Engine(run.model, run.optimizer, config, degree, run.seed, world, filled, run.parallel)
    checkpoint = newest_good(folder, world)
    trainer = begin(run, info, engine, checkpoint, min(run.steps, stop_at_step or run.steps))
    peak, peak_source = peak_flops_per_second(world.device)
    facts = engine_facts(engine, counts) | {"peak_flops_per_second": peak, "peak_source": peak_source}
    on_main(world, lambda: folder.describe(run, config, facts, info.tokenizer_path))
    say(
        world,
        f"{run.name}: {counts.total:,} parameters ({counts.active:,} active), {world.size} ranks, expert parallel "
        f"{degree}, ZeRO {engine.zero_stage}; steps {trainer.progress.step} to {trainer.until_step} of {run.steps} in "
        f"{folder.path}",
    )
    if trainer.is_ending:
        why = "was stopped early, by its validation loss" if trainer.progress.stopped_early else "is already there"
        say(world, f"nothing to do: the run {why}")
        if signals is not None:
            signals.settle()
        return trainer
    speed = Speed(flops_per_token(run.model, run.seq_len), peak)
    trainer.reasons_to_stop = reasons_to_stop(world, deadline, signals)
    saver = Saver(folder, deadline, trainer)
    try:
        trainer.train(make_hooks(trainer, folder, info, speed, saver))
    finally:
        saver.close()
    if signals is not None:
        signals.settle()
    say(world, how_it_ended(trainer) + f"; see {folder.path}")
    return trainer


def reasons_to_stop(world: World, deadline: Deadline, signals: StopSignals | None) -> dict[str, Callable[[], bool]]:
    """What each rank is asked at the end of a step. The clock is the main process's alone."""
    return {
        "a signal": lambda: signals is not None and signals.received is not None,
        "--max_minutes": lambda: world.is_main and deadline.is_up(),
    }


def engine_facts(engine: Engine, counts: Counts) -> dict[str, Any]:
    """What a run folder tells of the layout that the run started in."""
    return {
        "world_size": engine.world.size,
        "expert_parallel": engine.degree,
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


def begin(run: Run, info: DatasetInfo, engine: Engine, checkpoint: Checkpoint | None, until_step: int) -> Trainer:
    """A trainer at a checkpoint, or at the start."""
    progress, data_state = Progress(), None
    if checkpoint is not None:
        load_engine(checkpoint, engine)
        progress = Progress(**checkpoint.state["progress"])
        data_state = checkpoint.state["data"]
    loader = Loader(
        run.data,
        info,
        seq_len=run.seq_len,
        global_batch=run.batch_sequences,
        rank=engine.world.rank,
        world_size=engine.world.size,
        seed=run.seed,
        state=data_state,
    )
    return Trainer(run, engine, loader, progress, until_step)


def make_hooks(trainer: Trainer, folder: RunFolder, info: DatasetInfo, speed: Speed, saver: Saver) -> list[Hook]:
    """What happens after each step, in this order. The main process alone reports."""
    run, world, step = trainer.run, trainer.engine.world, trainer.progress.step

    def first(samples: int | None) -> ValidationBatches:
        return ValidationBatches(
            run.data,
            info,
            batch=run.micro_batch,
            rank=world.rank,
            world_size=world.size,
            seq_len=run.seq_len,
            limit=samples,
        )

    held_out = first(run.validation_samples or None) if run.validate_every_steps else None
    questions = first(run.exact_match_samples) if run.exact_match_samples else None
    hooks: list[Hook] = [NonfiniteGuard(run.nonfinite), Validation(held_out, questions)]
    if world.is_main:
        hooks.append(Metrics(folder, step, make_trackers(run, folder.path), speed))
        hooks.append(ProgressBar(run, step, trainer.until_step, speed))
    hooks.append(saver)
    if world.is_main:
        hooks.append(Plots(folder))
    return hooks


def newest_good(folder: RunFolder, world: World) -> Checkpoint | None:
    """The newest checkpoint whose every file has its checksum, each rank reading its share; None for a fresh folder.

    One that is damaged is named and passed over. If all are, CheckpointError: a run never starts from zero in silence.
    """
    found = on_main(world, lambda: candidates(folder.checkpoints))
    for path in reversed(found.values()):
        checkpoint, problem = None, None
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.verify(world.rank, world.size)
        except CheckpointError as error:
            problem = str(error)
        problems = gather_problems(problem)
        if not problems:
            return checkpoint
        say(world, f"warning: passing over a damaged checkpoint: {problems[0]}")
    if found:
        raise CheckpointError(f"every checkpoint in {folder.checkpoints} is damaged; remove them to start afresh")
    return None
