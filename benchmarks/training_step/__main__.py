"""`python -m benchmarks.training_step`: whole training steps of our recipes beside their peers.

Every recipe has a process of its own, in which all contenders take turns.
"""

import datetime
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch

from benchmarks.moe_layer import hardware
from benchmarks.training_step.cases import SIZES, make_case
from benchmarks.training_step.contenders import Precision
from benchmarks.training_step.measure import measure
from benchmarks.training_step.report import compare, render
from mosaic_dist.cli import run_command
from mosaic_dist.errors import UserError
from mosaic_dist.files import write_atomic
from mosaic_dist.parallel import join_world, leave_world
from mosaic_dist.spec import Positive, nearest

Scale = Literal["auto", "cpu", "full"]
Dtype = Literal["auto", "fp32", "bf16"]


def training_step(
    recipes: str | tuple[str, ...] = tuple(SIZES["full"]),
    scale: Scale = "auto",
    dtype: Dtype = "auto",
    rounds: Positive = 7,
    output: str | None = None,
    against: str | None = None,
    child: bool = False,
) -> None:
    """Compare whole training steps of our recipes with their peers, and print a table. No time is ever an error.

    --recipes NAMES       of those by default, as gpt2_reference,t4_moe
    --scale NAME          cpu: few layers and short sequences; full: the recipes' own; auto: full with a GPU
    --dtype NAME          fp32, bf16, or auto: both on a CPU, and the faster one of each contender; bf16 on a GPU
    --rounds N            how often each contender steps
    --output FILE         write the results there as JSON, and beside it the table as .md
    --against FILE        also compare with results that --output wrote
    --child               measure the one recipe here, and print its results as JSON
    """
    scale = ("full" if torch.cuda.is_available() else "cpu") if scale == "auto" else scale
    names = (recipes,) if isinstance(recipes, str) else recipes
    for name in names:
        if name not in SIZES[scale]:
            raise UserError(f"no recipe {name!r} here; {nearest(name, list(SIZES[scale]))}")
    if child:
        print(json.dumps(_measure(names[0], scale, dtype, rounds)))
        return
    old = None if against is None else _read(against)
    results = []
    for name in names:
        words = f"--child --recipes {name} --scale {scale} --dtype {dtype} --rounds {rounds}".split()
        command = [sys.executable, "-m", "benchmarks.training_step", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}: exit code {done.returncode} (-9: killed, most likely for memory)")
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {results[-1]['times']}", file=sys.stderr, flush=True)
    facts = _facts(rounds)
    page = render(results, facts)
    print(page)
    if output is not None:
        write_atomic(output, json.dumps({"facts": facts, "results": results}, indent=1) + "\n")
        write_atomic(Path(output).with_suffix(".md"), page)
    if old is not None:
        print(compare(results, old))


def _measure(recipe: str, scale: str, dtype: Dtype, rounds: int) -> dict[str, Any]:
    world = join_world(600)
    deepspeed.init_distributed(dist_init_required=False)
    both: tuple[Precision, ...] = ("bf16",) if world.device.type == "cuda" else ("fp32", "bf16")
    found = measure(make_case(recipe, SIZES[scale][recipe]), both if dtype == "auto" else (dtype,), rounds, world)
    leave_world()
    return found


def _read(file: str) -> list[dict[str, Any]]:
    try:
        return json.loads(Path(file).read_text())["results"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} holds no results of this benchmark: {error!r}") from None


def _facts(rounds: int) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "command": f"python -m benchmarks.training_step {' '.join(sys.argv[1:])}".strip(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(torch.device("cuda" if on_gpu else "cpu")),
        "memory": "what the allocator gave" if on_gpu else "counted from operation to operation",
        "rounds": rounds,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "transformers": version("transformers"),
    }


if __name__ == "__main__":
    run_command(training_step, "python -m benchmarks.training_step")
