"""`python -m mosaic_dist sweep`: the runs of a sweep, one after the other."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosaic_dist.compare.history import read_spec
from mosaic_dist.compare.processes import DEFAULT_LAUNCHER, RunOutcome, is_finished, run_all
from mosaic_dist.compare.slurm_array import write_array
from mosaic_dist.compare.sweep_config import PlannedRun, SweepConfig, named_run, plan_runs
from mosaic_dist.errors import UserError
from mosaic_dist.files import check_output_directory
from mosaic_dist.model import count_parameters
from mosaic_dist.parallel import read_config
from mosaic_dist.run import check_data
from mosaic_dist.spec import at
from mosaic_dist.train.interruption import INTERRUPTED_EXIT_CODE


def sweep(
    *file: str,
    output: str | None = None,
    launcher: str = DEFAULT_LAUNCHER,
    dry_run: bool = False,
    slurm: bool = False,
    **flags: Any,
) -> None:
    """Train all runs of a sweep, each in its own folder, one after the other.

    `sweep recipes/sweeps/attention.yaml`. The file names a recipe, flags of all runs, variants with theirs, a grid of
    values, and seeds. All runs are checked before the first one starts. The same command again goes on: finished runs
    are passed over, half-done ones continue. A run that fails is told at the end, with exit code 1. Ctrl-C or SIGTERM
    lets the run that is under way save, and ends the sweep with exit code 75. Any further flag is one of all runs, as
    on a recipe's command line, and goes before the file's.

    --output DIR          where the folders are; default runs/NAME_OF_THE_FILE
    --launcher WORDS      what starts a run, as "deepspeed --num_gpus 2", torchrun or python; {port} is a free port
    --dry_run             print the runs with their sizes and commands
    --slurm               write an sbatch array of the runs that are not finished instead, and say how to start it
    """
    if len(file) != 1:
        raise UserError("give one sweep, as `sweep recipes/sweeps/attention.yaml`")
    sheet = Path(str(file[0]))
    folder = Path(output or f"runs/{sheet.stem}")
    check_output_directory(folder)
    planned = plan_runs(read_spec(SweepConfig, sheet), flags, folder)
    sizes = [_size(one) for one in planned]
    if dry_run:
        for one, size in zip(planned, sizes, strict=True):
            print(f"{one.name}: {size}\n  {shlex.join([*shlex.split(launcher), *one.command])}")
        return
    _check_data(planned)
    if slurm:
        left = [one for one in planned if not is_finished(one)]
        print(write_array(left, sheet, folder) if left else f"all {len(planned)} runs are finished")
        return
    outcomes = run_all(planned, launcher)
    tell(outcomes, folder)


def tell(outcomes: Sequence[RunOutcome], folder: Path) -> None:
    """Say how the sweep went; the process ends here unless all runs are finished."""
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    left = [outcome for outcome in outcomes if outcome.state == "stopped"]
    finished = len(outcomes) - len(failed) - len(left)
    print(f"{finished} of {len(outcomes)} runs are finished; python -m mosaic_dist compare {folder}")
    for outcome in (*failed, *left):
        print(f"{outcome.state}: {outcome.name}: {outcome.reason}", file=sys.stderr)
    if failed:
        sys.exit(1)
    if left:
        sys.exit(INTERRUPTED_EXIT_CODE)


def _size(one: PlannedRun) -> str:
    """Parameters and tokens of a run. UserError where its model or its DeepSpeed config cannot be."""
    with named_run(one.name):
        with at("model"):
            counts = count_parameters(one.run.model)
        read_config(one.flags.get("ds_config"))
    tokens = one.run.tokens_after(one.run.steps)
    return f"{counts.total:,} parameters, {counts.active:,} active, {one.run.steps:,} steps, {tokens:,} tokens"


def _check_data(planned: Sequence[PlannedRun]) -> None:
    """Refuse data that is not there, or does not fit a model. UserError that names the run."""
    for one in planned:
        with named_run(one.name):
            check_data(one.run)
