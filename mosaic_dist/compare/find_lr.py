"""`python -m mosaic_dist find_lr`: a run whose learning rate grows until it diverges, and what that says."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mosaic_dist.compare.history import read_history
from mosaic_dist.compare.processes import DEFAULT_LAUNCHER, run_all
from mosaic_dist.compare.sweep_config import SweepConfig, named_run, plan_runs
from mosaic_dist.errors import UserError
from mosaic_dist.figure import publish, pyplot
from mosaic_dist.files import check_output_directory
from mosaic_dist.run import check_data
from mosaic_dist.spec import Positive, PositiveFloat
from mosaic_dist.train.plot import RUN_INK, smooth

HALF_LIFE_SHARE = 0.02
"""Of the smoothed loss, as a share of the steps."""
DIVERGED = 1.2
"""Times the lowest smoothed loss: from there on nothing is learnt any more."""
MARGIN = 10.0
"""Between the suggestion and the learning rate whose loss was lowest."""
PICTURE = "learning_rate.png"
PLAIN = {
    "batch_ramp": None,
    "validate_every_steps": 0,
    "exact_match_samples": 0,
    "early_stopping_patience": 0,
    "checkpoint.keep_best": 0,
    "on_nonfinite_loss": "stop",
    "spikes.action": "none",
}
"""What a recipe may do beside, and this run does not."""


class Found(NamedTuple):
    """Learning rates of a range test."""

    steepest: float
    """Where the smoothed loss falls fastest."""
    lowest: float
    """Where it was lowest."""
    diverged: float | None
    """From where on it was more than DIVERGED times as high; None if it never was."""

    @property
    def suggested(self) -> float:
        """A peak for training: below the edge by MARGIN."""
        return self.lowest / MARGIN


def find_lr(
    *recipe: str,
    output: str = "runs/find_lr",
    low: PositiveFloat = 1e-6,
    high: PositiveFloat = 1.0,
    steps: Positive = 200,
    launcher: str = DEFAULT_LAUNCHER,
    **flags: Any,
) -> None:
    """Suggest a peak learning rate: train while it grows from step to step, and see where the loss falls and rises.

    `find_lr recipes/t4_moe.py --data work/data` (the range test of Smith, arXiv 1506.01186). The run may diverge, which
    is what it is for. Suggested is a tenth of the learning rate at which the smoothed loss was lowest; the picture in
    the run folder shows more. Any further flag is one of the recipe.

    --output DIR          the run folder's parent
    --low X, --high X     first and last learning rate
    --steps N             between them, evenly in the logarithm
    --launcher WORDS      what starts the run, as "deepspeed --num_gpus 2", torchrun or python; {port} is a free port
    """
    if len(recipe) != 1:
        raise UserError("give one recipe, as `find_lr recipes/t4_moe.py --data work/data`")
    if low >= high:
        raise UserError(f"--low ({low:g}) must be less than --high ({high:g})")
    check_output_directory(output)
    given = {
        "steps": steps,
        "optimizer.learning_rate": high,
        "schedule": {"type": "exponential", "first_fraction": low / high},
        "checkpoint.every_steps": steps,
    }
    (planned,) = plan_runs(SweepConfig(recipe=str(recipe[0])), {**PLAIN, **given, **flags}, Path(output))
    with named_run(planned.name):
        check_data(planned.run)
    (outcome,) = run_all([planned], launcher)
    if outcome.state == "stopped":
        raise UserError(f"{outcome.name}: {outcome.reason}")
    story = read_history(planned.folder)
    rates, losses = story.column("learning_rate"), story.column("loss")
    found = judge(rates, losses)
    draw(rates, losses, found, planned.folder / PICTURE)
    edge = "did not diverge; raise --high" if found.diverged is None else f"diverged at {found.diverged:.1e}"
    print(
        f"learning rate: steepest descent at {found.steepest:.1e}, lowest loss at {found.lowest:.1e}, {edge}\n"
        f"suggested: --optimizer.learning_rate {found.suggested:.1e}\n{planned.folder / PICTURE}"
    )


def judge(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """What losses tell that belong to growing learning rates; those that are no numbers are left out.

    UserError where the loss never fell.
    """
    told = [(rate, loss) for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)]
    smoothed = smooth([loss for _, loss in told], max(2.0, HALF_LIFE_SHARE * len(told)))
    best = min(range(len(told)), key=smoothed.__getitem__, default=0)
    if best < 2:
        raise UserError(f"the loss never fell in {len(told)} steps: give a lower --low, or more --steps")
    logs = [math.log(rate) for rate, _ in told]
    slopes = [(smoothed[i + 1] - smoothed[i - 1]) / (logs[i + 1] - logs[i - 1]) for i in range(1, best)]
    behind = (i for i in range(best, len(told)) if smoothed[i] > DIVERGED * smoothed[best])
    edge = next(behind, None)
    if edge is None and len(told) < len(rates):  # it went to infinity at once
        edge = len(told) - 1
    steepest = 1 + min(range(len(slopes)), key=slopes.__getitem__)
    return Found(told[steepest][0], told[best][0], None if edge is None else told[edge][0])


def draw(rates: Sequence[float], losses: Sequence[float], found: Found, path: Path) -> None:
    """The loss over the learning rate, and what was found, as PNG."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    smoothed = smooth(losses, max(2.0, HALF_LIFE_SHARE * len(losses)))
    axes.plot(rates, losses, color=RUN_INK.raw, linewidth=0.8, label="loss")
    axes.plot(rates, smoothed, color=RUN_INK.smoothed, linewidth=1.8, label="loss, EMA")
    marks = {"suggested": found.suggested, "steepest": found.steepest, "lowest": found.lowest}
    for (name, rate), style in zip(marks.items(), ("-", ":", "--"), strict=True):
        axes.axvline(rate, color=RUN_INK.points, linestyle=style, linewidth=1.2, label=f"{name}: {rate:.1e}")
    finite = [loss for loss in smoothed if math.isfinite(loss)]
    axes.set_ylim(min(finite) * 0.95, max(finite[0], min(finite)) * 1.15)  # what diverges leaves the picture
    axes.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    publish(figure, path)
