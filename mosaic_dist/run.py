"""From a recipe and a command line to a run: resolve, check, and only then start."""

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mosaic_dist.checkpoint import newest
from mosaic_dist.cli import fail, run_command
from mosaic_dist.data.mixture import Corpus
from mosaic_dist.data.settings import read_data_word
from mosaic_dist.errors import UserError
from mosaic_dist.model import Counts, Transformer, check_compiler, count_parameters
from mosaic_dist.parallel import (
    World,
    check_sequence_parallel,
    choose_degree,
    expert_counts,
    is_first_to_fail,
    join_world,
    leave_world,
    local_size_from_environment,
    rank_from_environment,
    read_config,
    resolve_precision,
    size_from_environment,
)
from mosaic_dist.run_spec import Run, import_recipe, read_run
from mosaic_dist.spec import Positive, PositiveFloat, at, leaves, override
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.initial import open_initial
from mosaic_dist.train.interruption import INTERRUPTED_EXIT_CODE, Deadline, StopSignals
from mosaic_dist.train.session import Start, train_run


@dataclass(frozen=True)
class Resolved:
    """A run with everything that follows from it on this cluster."""

    run: Run
    counts: Counts
    precision: str
    expert_parallel: int
    world_size: int
    accumulation: int
    config: dict[str, Any]
    """The DeepSpeed config, filled in."""


def resolve(run: Run, ds_config: str | None, world_size: int, local_size: int) -> Resolved:
    """Settle what the cluster decides. Raises UserError for what does not fit; nothing has started yet."""
    with at("model"):
        counts = count_parameters(run.model)
        run.model.width_factors()  # refuses a base that does not fit
    experts = _expert_counts(run.model)
    raw = read_config(ds_config)
    precision = resolve_precision(run.precision, raw)
    degree = choose_degree(run.parallel.expert_parallel, experts, world_size, local_size)
    check_sequence_parallel(run.model, run.parallel.sequence_parallel, run.seq_len, world_size, local_size)
    accumulation = run.accumulation(world_size)
    config = run.fill_config(raw, precision, world_size)
    return Resolved(run, counts, precision, degree, world_size, accumulation, config)


def check_data(run: Run) -> Corpus:
    """The run's dataset, after checking that model and data fit each other. Raises UserError."""
    info = run.data.load()
    if info.vocab_size > run.model.vocab_size:
        raise UserError(
            f"{info.path} has a vocabulary of {info.vocab_size} tokens, but model.vocab_size is "
            f"{run.model.vocab_size}; use --model.vocab_size {info.vocab_size}, or tokenize with a smaller vocabulary"
        )
    if info.seq_len % run.seq_len:
        raise UserError(
            f"{info.path} holds sequences of {info.seq_len} tokens, which do not divide into the run's "
            f"{run.seq_len}; use --data.seq_len {info.seq_len}, or tokenize with --seq_len {run.seq_len}"
        )
    if run.exact_match_samples and info.answer_loss is None:
        raise UserError(
            f"exact_match_samples is {run.exact_match_samples}, but the rows of {info.path} are no questions with "
            "an answer each; use --exact_match_samples 0, or data made by `python -m data_prep.arithmetic`"
        )
    return info


def _check_ramp(resolved: Resolved, checkpoints: Path) -> None:
    """Refuse ranks that could not take a batch that lies ahead of the newest checkpoint."""
    if resolved.run.batch_ramp is not None:
        found = newest(checkpoints)
        resolved.run.check_ramp(resolved.world_size, 0 if found is None else found.state["data"]["cursor"])


def _expert_counts(model: Transformer) -> list[int]:
    with torch.device("meta"):
        return expert_counts(model.build())


def describe(resolved: Resolved) -> str:
    """The resolved run, its parameter counts and its layout, for people."""
    run, counts = resolved.run, resolved.counts
    rows = [(name, *pair) for name, pair in counts.components.items()] + [("total", counts.total, counts.active)]
    table = "\n".join(f"  {name:<12} {total:>16,} {active:>16,}" for name, total, active in rows)
    stage = resolved.config["zero_optimization"]["stage"]
    ramp = "" if run.batch_ramp is None else f"ramp: {run.batch_ramp.describe(run.batch_tokens)}\n"
    return (
        f"{run.to_yaml()}\n"
        f"parameters             total           active\n{table}\n\n"
        f"layout: {resolved.world_size} ranks, expert parallel {resolved.expert_parallel}, ZeRO {stage}, "
        f"{resolved.precision}\n"
        f"batch: {run.batch_tokens:,} tokens = {run.batch_sequences} sequences of {run.seq_len} = "
        f"{run.dealt(resolved.world_size)} x {resolved.accumulation} micro-batches of {run.micro_batch_size}\n{ramp}"
        f"steps: {run.steps:,} = {run.tokens_after(run.steps):,} tokens"
    )


def main(run: Run) -> None:
    """The command line of a recipe: train `run`, with what the words change of it. The flags are in RECIPE_HELP."""

    def recipe(
        ds_config: str | None = None,
        output: str | None = None,
        data: str | None = None,
        expert_parallel: Positive | Literal["auto"] | None = None,
        stop_at_step: Positive | None = None,
        max_minutes: PositiveFloat | None = None,
        dry_run: bool = False,
        local_rank: int | None = None,  # the deepspeed launcher's own word; the environment says the same
        **overrides: Any,
    ) -> None:
        short = {} if data is None else read_data_word(data)
        short |= {} if expert_parallel is None else {"parallel.expert_parallel": expert_parallel}
        changed = override(run, overrides | short)
        if start(changed, ds_config, output or f"runs/{changed.name}", stop_at_step, max_minutes, dry_run):
            sys.exit(INTERRUPTED_EXIT_CODE)

    fields = "\n".join(f"  --{path:<40} {value}" for path, value in leaves(run))
    recipe.__doc__ = RECIPE_HELP.format(name=run.name, fields=fields, interrupted=INTERRUPTED_EXIT_CODE)
    run_command(recipe, f"deepspeed {Path(sys.argv[0]).name}", is_speaker=_is_first_of_node())


def main_from_yaml() -> None:
    """The command line of a run written as YAML (`--config FILE`), with the flags of every recipe.

    `--recipe FILE` names the Python file that defines parts of the run's own, if it has any.
    """
    config, recipe = _take_flag("--config"), _take_flag("--recipe")
    if not config:
        fail(UserError("--config FILE is needed: a run as YAML, such as a run folder's run.yaml"), _is_first_of_node())
    try:
        import_recipe(recipe)
        run = read_run(Path(config))
    except UserError as error:
        fail(error, _is_first_of_node())
    main(run)


def _take_flag(flag: str) -> str | None:
    """The value of a flag, which is removed from the command line; None where it is not there."""
    words = sys.argv[1:]
    place = next((i for i, word in enumerate(words) if word.partition("=")[0] == flag), None)
    if place is None:
        return None
    is_joined = "=" in words[place]
    given = words[place].partition("=")[2] if is_joined else (words[place + 1 :] or [""])[0]
    del sys.argv[1 + place : 1 + place + (1 if is_joined else 2)]
    return given


def start(
    run: Run, ds_config: str | None, output: str, stop_at_step: int | None, max_minutes: float | None, dry_run: bool
) -> bool:
    """Resolve and check a run, then train it in the folder `output`, or only print it. UserError for what is wrong.

    Returns whether a signal or the clock stopped it, so that another start is wanted.
    """
    deadline = Deadline(max_minutes)
    resolved = resolve(run, ds_config, size_from_environment(), local_size_from_environment())
    checkpoints = RunFolder(output).checkpoints
    _check_ramp(resolved, checkpoints)
    if dry_run:
        if rank_from_environment() == 0:
            print(describe(resolved))
        return False
    if run.parallel.compile:
        check_compiler(torch.cuda.is_available())
    signals = StopSignals()
    info = check_data(run)
    initial = open_initial(run, info, checkpoints)
    with _world(run.parallel.timeout_seconds) as world:
        trainer = train_run(
            Start(
                run=run,
                info=info,
                config=resolved.config,
                degree=resolved.expert_parallel,
                counts=resolved.counts,
                output=output,
                stop_at_step=stop_at_step,
                initial=initial,
                deadline=deadline,
                signals=signals,
            ),
            world,
        )
    return not trainer.has_arrived


RECIPE_HELP = """Train the run {name!r}.

Start it with `deepspeed`, `torchrun`, `srun`, or plain `python` for one process. A folder that holds this run
already is continued from its newest checkpoint.

  --ds_config FILE      DeepSpeed JSON (ds_configs/); without it ZeRO stage 1
  --output DIR          run folder; default runs/NAME
  --data DIR            dataset made by `python -m data_prep.tokenize_to_mds`; or several to mix: DIR=0.7,DIR=0.3;
                        for DIR also a URL (s3://bucket/folder), with --data.cache DIR
  --init_from DIR   start from the weights of an exported model, or of a Hugging Face folder
  --expert_parallel N   ranks that share the experts of a layer; "auto" by default
  --stop_at_step N      save a checkpoint and stop there; start again to go on
  --max_minutes N       save and stop in time for the whole start to take at most N minutes
  --dry_run             print the resolved run and its parameter counts, and stop

SIGTERM, SIGUSR1 or Ctrl-C to any process of the run makes all of them save at the end of the step and stop. A run that
was stopped so, or by --max_minutes, ends with exit code {interrupted}: start it again. A second Ctrl-C, more than
2 s after the first, ends it at once without saving. After Ctrl-C, `deepspeed` and `torchrun` kill ranks that have not
ended within 30 s, which leaves the checkpoint before. Where a step and a save take longer, send SIGUSR1 to one rank
instead; for torchrun, TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 allows 600 s.

Any field of the run is changed by its path, and the name of another kind swaps a part (--model.norm layernorm).
A path through the list of blocks means all of them, layers[0] or layers.0 one. The fields and their values here:

{fields}"""


def _is_first_of_node() -> bool:
    """Whether this process tells what all processes of the node find out before they meet.

    Until then all of them read the same words and the same files, so an error that one has, all have.
    """
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0


CRASH_EXIT_CODE = 1


@contextlib.contextmanager
def _world(timeout_seconds: float) -> Iterator[World]:
    """The process group around a run. An error on one rank is told once, and ends all ranks at once."""
    world = join_world(timeout_seconds)
    try:
        yield world
    except BaseException as error:
        if world.size == 1:
            leave_world()
            raise
        if is_first_to_fail():
            where = f"[rank {world.rank} on {socket.gethostname()}]"
            if isinstance(error, UserError) and not os.environ.get("MOSAIC_DEBUG"):
                print(f"error: {error}", file=sys.stderr, flush=True)
            else:
                print(f"{where} failed first:", file=sys.stderr)
                traceback.print_exc()
        else:
            time.sleep(GRACE_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        # not sys.exit: the others may sit in a collective that an orderly end would wait for
        os._exit(error.exit_code if isinstance(error, UserError) else CRASH_EXIT_CODE)
    leave_world()


GRACE_SECONDS = 1.0
"""Time that the first rank to fail has for its message before others end and the launcher kills the rest."""
