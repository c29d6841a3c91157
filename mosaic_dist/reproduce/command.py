"""`python -m mosaic_dist reproduce`: run a run again, and compare."""

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosaic_dist.checkpoint import Checkpoint, candidates
from mosaic_dist.data.settings import read_data_word
from mosaic_dist.errors import UserError
from mosaic_dist.files import check_new_directory, write_atomic
from mosaic_dist.parallel.deepspeed_config import OWN_KEYS
from mosaic_dist.parallel.world import free_port
from mosaic_dist.reproduce.circumstances import Change, changes, check_data, read_folder
from mosaic_dist.reproduce.comparison import MetricComparison, compare
from mosaic_dist.run_spec import import_recipe
from mosaic_dist.spec import NonNegativeFloat, Positive, override
from mosaic_dist.train.folder import RunFolder, environment
from mosaic_dist.train.metrics import read_metrics

FAILED_EXIT_CODE = 1
REPORT = "reproduction.json"
RERUN = "mosaic_dist.reproduce.rerun"


def reproduce(
    *folder: str,
    output: str | None = None,
    steps: Positive | None = None,
    data: str | None = None,
    launcher: str = "auto",
    tolerance: NonNegativeFloat = 0.0,
    dry_run: bool = False,
    recipe: str | None = None,
) -> None:
    """Run a run again from its own folder, and compare the numbers of every step.

    `reproduce RUN` tells what of the environment is not as it was, proves that the data is the same, trains anew with
    the run's recipe, DeepSpeed config, ranks and expert parallelism, and compares losses, gradient norms and the like.
    On the same machine and layout they are bitwise equal. Exit code 1 if they are not.

    --output DIR          the new run folder; RUN_again by default; must not exist yet
    --steps N             only so many steps; by default all that the run has made
    --data DIR            where the data lies now, as a recipe takes it
    --launcher NAME       python, torchrun or deepspeed on this machine; or the words in front of `python` that start
                          the ranks, as "srun --ntasks 16". auto: python for one rank, else torchrun
    --tolerance X         largest relative difference that passes; 0, bitwise equal, by default
    --dry_run             check environment and data, print the command, and stop
    --recipe FILE         the Python file that defines parts of the run's own, if it has any; its code is run
    """
    import_recipe(recipe)
    if len(folder) != 1:
        raise UserError("give one run, as `reproduce runs/t4_moe`")
    there, run = read_folder(str(folder[0]))
    here = RunFolder(output or f"{there.path}_again")
    check_new_directory(here.path)
    facts = json.loads((there.path / "environment.json").read_text())
    changed = list(changes(facts, environment()))
    print(render_changes(changed))
    print(f"data: {check_data(run if data is None else override(run, read_data_word(data)), there)}")
    records = read_metrics(there.metrics)
    if not records:
        raise UserError(f"{there.path} cannot be reproduced: it has not made a step yet")
    until_step = min(records[-1]["step"], steps or records[-1]["step"])
    flags = arguments(there, here, facts, until_step) + ([] if data is None else ["--data", data])
    flags += [] if recipe is None else ["--recipe", recipe]
    run_again([*launch(launcher, facts["world_size"]), *flags], there, here, dry_run)
    if not dry_run and not judge(
        there, here, compare(records, read_metrics(here.metrics), until_step), changed, tolerance
    ):
        sys.exit(FAILED_EXIT_CODE)


def run_again(words: list[str], there: RunFolder, here: RunFolder, dry_run: bool) -> None:
    """Print the command and, but for `dry_run`, wait for it. UserError where it fails."""
    with tempfile.TemporaryDirectory(prefix="mosaic_") as place:
        config = Path(place) / "ds_config.json"
        write_atomic(config, json.dumps(own_config(there), indent=2) + "\n")
        words = [*words, "--ds_config", str(config)]
        print(f"command: {shlex.join(words)}", flush=True)
        if dry_run:
            return
        done = subprocess.run(words, check=False)
    if done.returncode:
        raise UserError(f"the repeated run ended with exit code {done.returncode}; see above, and {here.path}")


def judge(there: RunFolder, here: RunFolder, found: MetricComparison, changed: list[Change], tolerance: float) -> bool:
    """Whether the two runs are equal; told to people, and to programs in the new folder."""
    same_files = compare_checkpoints(there, here)
    equal = found.is_within(tolerance) and (tolerance > 0 or same_files is not False)
    print(render(found, same_files, equal, tolerance))
    report = {"equal": equal, "tolerance": tolerance, "same_checkpoint": same_files, **as_json(found, changed)}
    write_atomic(here.path / REPORT, json.dumps(report, indent=2) + "\n")
    return equal


def launch(launcher: str, ranks: int) -> list[str]:
    """The words that start so many ranks of a repeated run. UserError for `python` where there are several."""
    if launcher == "auto":
        launcher = "python" if ranks == 1 else "torchrun"
    if launcher == "python":
        if ranks > 1:
            raise UserError(f"the run had {ranks} ranks, and --launcher python starts one; use torchrun or deepspeed")
        return [sys.executable, "-m", RERUN]
    if launcher == "torchrun":
        local = ["--standalone", "--nproc_per_node", str(ranks)]
        return [sys.executable, "-m", "torch.distributed.run", *local, "-m", RERUN]
    if launcher == "deepspeed":
        local = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *local, "--module", RERUN]
    return [*shlex.split(launcher), sys.executable, "-m", RERUN]


def arguments(there: RunFolder, here: RunFolder, facts: dict[str, Any], until_step: int) -> list[str]:
    """The flags of the repeated run: the run's own, with what the cluster had settled, and no trackers."""
    filled = json.loads((there.path / "ds_config.json").read_text())
    enabled = [name for name in ("bf16", "fp16") if filled.get(name, {}).get("enabled")]
    flags = {
        "config": there.run_yaml,
        "output": here.path,
        "expert_parallel": facts["expert_parallel"],
        "precision": enabled[0] if enabled else "fp32",
        "stop_at_step": until_step,
        "logging.trackers": "[]",
        "data.verify": "hashes",
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def own_config(there: RunFolder) -> dict[str, Any]:
    """The run's DeepSpeed config without what the recipe fills in, which at ZeRO stage 0 is not the recipe's value."""
    filled = json.loads((there.path / "ds_config.json").read_text())
    return {key: value for key, value in filled.items() if key in (*OWN_KEYS, "bf16", "fp16")}


def compare_checkpoints(there: RunFolder, here: RunFolder) -> bool | None:
    """Whether weights, moments and generators of the last common checkpoint are the same bytes; None without one."""
    ours, theirs = candidates(here.checkpoints), candidates(there.checkpoints)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    files = [Checkpoint.open(found[common[-1]]).manifest["files"] for found in (ours, theirs)]
    return files[0] == files[1]


def render_changes(changed: Sequence[Change]) -> str:
    """What of the environment is not as it was, for people."""
    if not changed:
        return "environment: as it was"
    rows = [
        f"  {change.what}: {change.there} there, {change.here} here"
        + (" (may change the numbers)" if change.changes_numbers else "")
        for change in changed
    ]
    return "\n".join(["environment: differs", *rows])


def render(found: MetricComparison, same_files: bool | None, equal: bool, tolerance: float) -> str:
    """How the two runs compare, for people."""
    lines = [f"{found.numbers:,} numbers of {found.steps:,} steps compared"]
    if found.first is None or found.largest is None:
        lines.append("all of them are bitwise equal")
    else:
        for name, one in (("first", found.first), ("largest", found.largest)):
            lines.append(
                f"{name} difference: step {one.step}, {one.field}: {one.there!r} there, {one.here!r} here "
                f"(relative {one.relative:.2e})"
            )
    if found.missing:
        lines.append(f"the repeated run ended before step {found.missing[0]}")
    if same_files is not None:
        lines.append(
            f"the files of the last checkpoint that both have are {'the same' if same_files else 'not the same'}"
        )
    limit = "bitwise" if tolerance == 0 else f"within {tolerance:g}"
    return "\n".join([*lines, f"{'reproduced' if equal else 'NOT reproduced'}, {limit}"])


def as_json(found: MetricComparison, changed: Sequence[Change]) -> dict[str, Any]:
    """The comparison for programs."""
    return {
        "steps": found.steps,
        "numbers": found.numbers,
        "first": found.first and found.first._asdict(),
        "largest": found.largest and found.largest._asdict(),
        "missing": found.missing,
        "environment": [change._asdict() for change in changed],
    }
