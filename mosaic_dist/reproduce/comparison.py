"""The numbers of two runs, step by step."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

COMPARED = (
    "tokens",
    "loss",
    "auxiliary_loss",
    "learning_rate",
    "grad_norm",
    "skipped",
    "epoch",
    "expert_max_over_mean",
    "validation_loss",
    "validation_exact_match",
    "experts",
)
"""Fields of metrics.jsonl, with what is below them, that follow from the experiment, not from the machine's speed."""


class Difference(NamedTuple):
    """A number that came out otherwise; `relative` is the difference over the larger of the two."""

    step: int
    field: str
    there: float
    here: float
    relative: float


class MetricComparison(NamedTuple):
    """`first` in order of steps and `largest` difference, None where all numbers are bitwise equal.

    `missing` are steps of the run that the repeated one did not come to.
    """

    steps: int
    numbers: int
    first: Difference | None
    largest: Difference | None
    missing: list[int]

    def is_within(self, tolerance: float) -> bool:
        """Whether every number is there and differs by so much at most, relatively; 0 means bitwise."""
        return not self.missing and (self.largest is None or self.largest.relative <= tolerance)


def compare(there: Iterable[Mapping[str, Any]], here: Iterable[Mapping[str, Any]], until_step: int) -> MetricComparison:
    """Every number that both runs have of a step, up to `until_step`.

    A field that only one has is passed over: the last step of a start is validated and recorded out of turn.
    """
    was = {record["step"]: dict(numbers(record)) for record in there if record["step"] <= until_step}
    now = {record["step"]: dict(numbers(record)) for record in here}
    first = largest = None
    steps = sorted(was.keys() & now.keys())
    count = 0
    for step in steps:
        for field in was[step].keys() & now[step].keys():
            count += 1
            found = Difference(
                step, field, was[step][field], now[step][field], relative(was[step][field], now[step][field])
            )
            if found.relative > 0:
                first = first or found
                largest = found if largest is None or found.relative > largest.relative else largest
    missing = [step for step in sorted(was) if step > max(now, default=0)]
    return MetricComparison(len(steps), count, first, largest, missing)


def numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The compared numbers of a record by name; lists and objects are taken apart."""
    for key, value in record.items():
        if key.partition("/")[0] in COMPARED:
            yield from _leaves(key, value)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{name}/{key}", item)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _leaves(f"{name}[{number}]", item)
    elif value is not None:
        yield name, float(value)


def relative(there: float, here: float) -> float:
    """0 for equal numbers, NaN included; infinity where only one of them is finite."""
    if there == here or (math.isnan(there) and math.isnan(here)):
        return 0.0
    if not (math.isfinite(there) and math.isfinite(here)):
        return math.inf
    return abs(there - here) / max(abs(there), abs(here))
