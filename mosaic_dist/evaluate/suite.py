"""Several evaluations of several models, one after another, in one table."""

import json
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.evaluation import Evaluation
from mosaic_dist.evaluate.model_source import LoadedModel, ModelSource
from mosaic_dist.files import write_atomic
from mosaic_dist.parallel import World
from mosaic_dist.spec import Spec, SpecError


class Suite(Spec):
    """What is measured of which models. Paths are relative to where the command is started."""

    models: tuple[ModelSource, ...] = ()
    evaluations: tuple[Evaluation, ...]

    def validate(self) -> None:
        """There is something to measure, and names tell all apart."""
        if not self.evaluations:
            raise SpecError("evaluations", "the list is empty; give at least one evaluation")
        for field, items in (("models", self.models), ("evaluations", self.evaluations)):
            labels = [item.label for item in items]
            twice = next((label for label in labels if labels.count(label) > 1), None)
            if twice is not None:
                raise SpecError(field, f"two are called {twice!r}; give one of them another name")


class Result(NamedTuple):
    """One evaluation of one model: its figures, or what went wrong."""

    model: str
    evaluation: str
    seconds: float
    figures: dict[str, Any]
    measures: dict[str, float]
    error: str | None


def run_suite(suite: Suite, world: World, folder: Path) -> list[Result]:
    """Everything, in order; an error ends only its own evaluation. Every rank calls.

    results.md and results.json in `folder` are written anew after each evaluation.
    """
    results: list[Result] = []
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    for subject in suite.models:
        opened: LoadedModel | None = None
        for evaluation in suite.evaluations:
            started, figures, error = time.monotonic(), {}, None
            try:
                opened = opened or subject.open()
                figures = evaluation.measure(opened, world)
            except Exception as problem:  # whatever it is, the others are worth having
                error = str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"
                if not isinstance(problem, UserError):
                    traceback.print_exc()
            measures = evaluation.measures(figures) if error is None else {}
            seconds = time.monotonic() - started
            results.append(Result(subject.label, evaluation.label, seconds, figures, measures, error))
            if world.is_main:
                write_atomic(folder / "results.json", json.dumps([told(result) for result in results], indent=2) + "\n")
                write_atomic(folder / "results.md", render(results))
    return results


def told(result: Result) -> dict[str, Any]:
    """A result as JSON takes it."""
    found: dict[str, Any] = {
        "model": result.model,
        "evaluation": result.evaluation,
        "seconds": round(result.seconds, 2),
    }
    return found | ({"figures": result.figures} if result.error is None else {"error": result.error})


def render(results: Sequence[Result]) -> str:
    """A Markdown table: a row for each measure, a column for each model; below it, what failed."""
    models = list(dict.fromkeys(result.model for result in results))
    evaluations = list(dict.fromkeys(result.evaluation for result in results))
    cells = {(result.evaluation, result.model): result for result in results}
    lines = [_row(["evaluation", "measure", *models]), _row(["---", "---", *["---:"] * len(models)])]
    for evaluation in evaluations:
        mine = [cells.get((evaluation, model)) for model in models]
        names = list(dict.fromkeys(name for result in mine if result for name in result.measures)) or ["-"]
        lines += [_row([evaluation, name, *(_cell(result, name) for result in mine)]) for name in names]
    failed = [result for result in results if result.error is not None]
    lines += [""] + [f"- {result.evaluation} of {result.model} failed: {result.error}" for result in failed]
    return "\n".join(lines).rstrip("\n") + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cell(result: Result | None, name: str) -> str:
    if result is None:
        return ""
    return "failed" if result.error is not None else f"{result.measures[name]:.4f}" if name in result.measures else ""
