"""Sizes of recipes, as a table."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

from mosaic_dist.errors import UserError
from mosaic_dist.model import count_parameters
from mosaic_dist.run_spec import Run


def recipes_in(folder: str | Path) -> Iterator[tuple[str, Run]]:
    """(name, run) of every recipe file of a folder, by name. UserError if there is none."""
    found = False
    for path in sorted(Path(folder).glob("*.py")):
        run = run_in(path)
        if run is not None:
            found = True
            yield path.stem, run
    if not found:
        raise UserError(f"{folder} holds no recipe (a Python file with a `run`)")


def run_in(path: Path) -> Run | None:
    """The `run` of a Python recipe, whose `main` is not called; None where there is none."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # recipes build on each other
    run = runpy.run_path(str(path), run_name=path.stem).get("run")
    return run if isinstance(run, Run) else None


def size_table(folder: str | Path) -> str:
    """Markdown table of the recipes of a folder: total and active parameters, layers, width, experts."""
    lines = ["| recipe | total | active | layers | width | experts |", "|---|---:|---:|---:|---:|---:|"]
    for name, run in recipes_in(folder):
        counts = count_parameters(run.model)
        experts = {getattr(block.ffn, "experts", 0) for block in run.model.layers}
        shown = ", ".join(str(number) for number in sorted(experts)) if experts != {0} else "dense"
        row = (f"`{name}`", f"{counts.total:,}", f"{counts.active:,}", len(run.model.layers), run.model.dim, shown)
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)
