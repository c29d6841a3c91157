"""`python -m benchmarks.cost_of_scale`: time and memory of a training step while one thing grows and the rest stays.

Every step is one of the engine (ZeRO-1, float32, AdamW) on random tokens: forward and backward, and the update. An axis
ends before a size whose step, by the growth up to then, would take longer than `--limit_seconds` or need more memory
than `--limit_gib`. Memory is counted: the bytes of all tensors, as operations make them and let them go.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.circumstances import circumstances, heading, table, write_results
from benchmarks.cost_of_scale.axes import AXES, Axis, Cost
from benchmarks.cost_of_scale.exponent import exponent, grows_too_fast
from benchmarks.cost_of_scale.measure import Clock, measure, measure_on_ranks
from benchmarks.cost_of_scale.picture import draw_costs
from mosaic_dist.cli import run_command
from mosaic_dist.errors import UserError
from mosaic_dist.parallel import World, join_world, leave_world
from mosaic_dist.spec import Positive, PositiveFloat, nearest

FIGURES = {
    "seconds": "forward, backward (s)",
    "update_seconds": "update (s)",
    "kept_bytes": "kept for backward (MiB)",
    "peak_bytes": "peak (MiB)",
}
MODULE = "benchmarks.cost_of_scale"


def along(axis: Axis, largest: int, rounds: int, clock: Clock, limit: Cost, world: World) -> dict[int, Cost]:
    """The costs by size, up to the first size that would be beyond a limit."""
    found: dict[int, Cost] = {}
    for size in tqdm([s for s in axis.sizes if s <= largest], desc=axis.name, unit="size", disable=None):
        if found and is_beyond(list(found.values()), limit):
            break
        case = axis.case(size)
        found[size] = measure(case, rounds, clock, world) if case.ranks == 1 else measure_on_ranks(case, rounds, clock)
    return found


def is_beyond(costs: Sequence[Cost], limit: Cost) -> bool:
    """Whether the next size, by the growth from the last but one to the last, would pass a limit."""
    before, last = costs[-2:] if len(costs) > 1 else (costs[0], costs[0])
    return any(now * max(1.0, now / max(was, 1e-9)) > most for was, now, most in zip(before, last, limit, strict=True))


def rows_of(axis: Axis, costs: dict[int, Cost]) -> list[list[str]]:
    """A line for each figure: where it begins and ends, and the exponents."""
    rows, sizes = [], list(costs)
    for figure, label in FIGURES.items():
        values, expected = [getattr(cost, figure) for cost in costs.values()], getattr(axis.expected, figure)
        found = exponent(sizes, values)
        first, last = (f"{v / 2**20:,.1f}" if figure.endswith("bytes") else f"{v:.4f}" for v in (values[0], values[-1]))
        told = "" if found is None else f"{found:.2f}"
        verdict = "too fast" if grows_too_fast(found, expected) else ""
        span = f"{sizes[0]:,} to {sizes[-1]:,}"
        rows.append([axis.name, span, label, first, last, told, f"{expected:g}", verdict])
    return rows


def cost_of_scale(
    axes: str | tuple[str, ...] = tuple(axis.name.replace(", ", "_").replace(" ", "_") for axis in AXES),
    largest: Positive = 1 << 30,
    rounds: Positive = 5,
    clock: Clock = "wall",
    limit_seconds: PositiveFloat = 8.0,
    limit_gib: PositiveFloat = 3.0,
    output: str | None = None,
) -> None:
    """Measure along every axis and print the exponents of growth beside those that are expected.

    --axes NAMES          as batch,context_full,context_window,context_linear,experts,vocabulary,expert_parallel,layers
    --largest N           no size above it
    --rounds N            timed steps of each size at most; the best counts
    --clock NAME          wall, or cpu: the time of this process's threads, where others use the machine
    --limit_seconds X     of one step
    --limit_gib X         of the tensors of one step
    --output FILE         where to write the page; JSON and the picture lie beside it
    """
    chosen = choose(axes.split(",") if isinstance(axes, str) else axes)
    limit = Cost(limit_seconds, limit_seconds, limit_gib * 2**30, limit_gib * 2**30)
    world = join_world(600)
    found: dict[str, dict[int, Cost]] = {}
    rows: list[list[str]] = []
    for axis in chosen:
        found[axis.name] = along(axis, largest, rounds, clock, limit, world)
        rows += rows_of(axis, found[axis.name])
        print("\n".join("  ".join(row) for row in rows[-len(FIGURES) :]), file=sys.stderr, flush=True)
    leave_world()
    facts = circumstances(MODULE)
    names = ("what grows", "from, to", "figure", "at first", "at last", "exponent", "expected", "")
    text = f"{heading('Cost of scale', facts)}\n\n{table(names, rows)}\n"
    print(text)
    if output is not None:
        figures = {name: {size: cost._asdict() for size, cost in costs.items()} for name, costs in found.items()}
        write_results(output, text, facts | {"clock": clock}, figures)
        draw_costs(found, chosen, Path(output).with_suffix(".png"))


def choose(names: Sequence[str]) -> list[Axis]:
    """Axes by the words of the command line."""
    known = {axis.name.replace(", ", "_").replace(" ", "_"): axis for axis in AXES}
    for name in names:
        if name not in known:
            raise UserError(f"no axis {name!r}; {nearest(name, list(known))}")
    return [known[name] for name in names]


if __name__ == "__main__":
    run_command(cost_of_scale, f"python -m {MODULE}")
