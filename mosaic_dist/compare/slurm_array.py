"""The runs of a sweep as an sbatch array: a job for each, started as the scripts in slurm/ start theirs."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from mosaic_dist.compare.sweep_config import PlannedRun
from mosaic_dist.errors import UserError
from mosaic_dist.files import write_atomic

LAUNCH = Path("slurm/launch.sh")
SETTINGS = {"ds_config": "DS_CONFIG", "data": "DATA", "expert_parallel": "EXPERT_PARALLEL"}
"""Flags that `launch.sh` gives the recipe itself, by the variables that it takes them from."""
SCRIPT = """\
#!/usr/bin/env bash
# The runs of {sheet}, a job for each. From the repository: `sbatch {path}`
# Words for sbatch go before the script, as `sbatch --gpus-per-node=8 --array=0-{last}%4 {path}` for four at a time.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
case ${{SLURM_ARRAY_TASK_ID:?start this with sbatch}} in
{cases}
esac
exec bash "${{SLURM_SUBMIT_DIR:?start this with sbatch}}/slurm/launch.sh" "${{words[@]}}" "$@"
"""


def write_array(planned: Sequence[PlannedRun], sheet: Path, folder: Path) -> str:
    """Write `folder`/sweep.sh, and say how to start it. UserError where the scripts of slurm/ are not here."""
    if not LAUNCH.exists():
        raise UserError(f"{LAUNCH} is not here; start this in the repository")
    path = folder / "sweep.sh"
    text = SCRIPT.format(
        sheet=sheet,
        path=shlex.quote(str(path)),
        name=sheet.stem,
        last=len(planned) - 1,
        cases="\n".join(f"  {i}) {_assignments(one)} ;;" for i, one in enumerate(planned)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return f"{len(planned)} runs: sbatch {path}"


def _assignments(one: PlannedRun) -> str:
    """What `launch.sh` takes of a run, as words of bash."""
    script, *before = one.script
    values = {"OUTPUT": str(one.folder), "RECIPE": script}
    values |= {name: str(one.flags[flag]) for flag, name in SETTINGS.items() if flag in one.flags}
    assigned = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    return f"export {' '.join(assigned)}; words=({shlex.join([*before, *one.words(*SETTINGS)])})"
