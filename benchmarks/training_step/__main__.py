"""`python -m benchmarks.training_step`: whole training steps of our recipes beside their peers.

Every contender has a process of its own, and in each round all of them take turns.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.circumstances import circumstances
from benchmarks.training_step.cases import SIZES, make_case
from benchmarks.training_step.contenders import Precision
from benchmarks.training_step.measure import measure
from benchmarks.training_step.report import compare, render
from benchmarks.training_step.seats import seated
from mosaic_dist.cli import run_command
from mosaic_dist.errors import UserError
from mosaic_dist.files import write_atomic
from mosaic_dist.spec import Positive, nearest

Scale = Literal["auto", "tiny", "cpu", "full"]
Dtype = Literal["auto", "fp32", "bf16"]


def training_step(
    recipes: str | tuple[str, ...] = tuple(SIZES["full"]),
    scale: Scale = "auto",
    dtype: Dtype = "auto",
    rounds: Positive = 7,
    output: str | None = None,
    against: str | None = None,
) -> None:
    """Compare whole training steps of our recipes with their peers, and print a table. No time is ever an error.

    --recipes NAMES       of those by default, as gpt2_reference,t4_moe
    --scale NAME          cpu: few layers and short sequences; full: the recipes' own; auto: full with a GPU; tiny: only
                          to see that everything runs
    --dtype NAME          fp32, bf16, or auto: both on a CPU, and the faster one of each contender; bf16 on a GPU
    --rounds N            how often each contender steps
    --output FILE         write the results there as JSON, and beside it the table as .md
    --against FILE        also compare with results that --output wrote
    """
    scale = ("full" if torch.cuda.is_available() else "cpu") if scale == "auto" else scale
    names = recipes.split(",") if isinstance(recipes, str) else recipes
    for name in names:
        if name not in SIZES[scale]:
            raise UserError(f"no recipe {name!r} here; {nearest(name, list(SIZES[scale]))}")
    old = None if against is None else _read(against)
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    both: tuple[Precision, ...] = ("bf16",) if torch.cuda.is_available() else ("fp32", "bf16")
    results: list[dict[str, Any]] = []
    facts = _facts(rounds)
    for name in names:
        with seated(name, scale, both if dtype == "auto" else (dtype,)) as ring:
            results.append(measure(make_case(name, SIZES[scale][name]), ring, rounds))
        print(f"{name}: {results[-1]['times']}", file=sys.stderr, flush=True)
        if output is not None:  # what was measured stays, should the next one be too large
            write_atomic(output, json.dumps({"facts": facts, "results": results}, indent=1) + "\n")
            write_atomic(Path(output).with_suffix(".md"), render(results, facts))
    print(render(results, facts))
    if old is not None:
        print(compare(results, old))


def _read(file: str) -> list[dict[str, Any]]:
    try:
        return json.loads(Path(file).read_text())["results"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} holds no results of this benchmark: {error!r}") from None


def _facts(rounds: int) -> dict[str, Any]:
    memory = "what the allocator gave" if torch.cuda.is_available() else "counted from operation to operation"
    told = {"memory": memory, "rounds": rounds, "transformers": version("transformers")}
    return circumstances("benchmarks.training_step") | told


if __name__ == "__main__":
    run_command(training_step, "python -m benchmarks.training_step")
