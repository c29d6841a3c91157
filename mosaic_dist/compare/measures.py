"""What variants of a run came to: means and spreads over their seeds, and losses where all of them have been."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy

from mosaic_dist.compare.history import Axis, RunHistory
from mosaic_dist.errors import UserError
from mosaic_dist.run_spec import differences
from mosaic_dist.spec import nearest
from mosaic_dist.train.plot import EMA_HALF_LIFE_SHARE, smooth

POINTS: tuple[Axis, ...] = ("tokens", "flops", "time")
"""The axes on which losses are compared."""


class Spread(NamedTuple):
    """A figure over the seeds of a variant."""

    mean: float
    deviation: float | None
    """Of the sample (n - 1); None of a single one."""
    n: int


@dataclass(frozen=True)
class Variant:
    """The runs that are one experiment but for their seed."""

    name: str
    stories: list[RunHistory]


def group(stories: Iterable[RunHistory]) -> list[Variant]:
    """The variants among runs, in their order: those of one name without `_seedN` that differ in nothing but the seed.

    Where two experiments have the same name, each is called by the folder of its first run.
    """
    found: list[Variant] = []
    for story in stories:
        name = seedless(story)
        same = (v for v in found if v.name == name and not _differ(v.stories[0], story))
        if (variant := next(same, None)) is not None:
            variant.stories.append(story)
        else:
            found.append(Variant(name, [story]))
    names = [variant.name for variant in found]
    return [
        variant if names.count(variant.name) == 1 else Variant(str(variant.stories[0].path), variant.stories)
        for variant in found
    ]


def seedless(story: RunHistory) -> str:
    """The run's name without the seed that a sweep writes behind it."""
    return story.run.name.removesuffix(f"_seed{story.run.seed}")


def _differ(one: RunHistory, other: RunHistory) -> bool:
    mine = replace(one.run, name=other.run.name, seed=other.run.seed)
    return next(differences(mine, other.run), None) is not None


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    return Spread(statistics.fmean(values), deviation, len(values))


def reached(variants: Sequence[Variant], axis: Axis) -> float:
    """The largest point of an axis that every run has got to."""
    return min(story.along(axis)[-1] for variant in variants for story in variant.stories)


def smoothed(story: RunHistory, half_life_tokens: float) -> list[float]:
    """The moving average of a run's training loss, whose half-life is so many tokens, and two records at least."""
    tokens = story.column("tokens")
    spans = [b - a for a, b in itertools.pairwise([0.0, *tokens])]  # they grow while a batch ramp lasts
    return smooth(story.column("loss"), max(2.0 * tokens[-1] / len(tokens), half_life_tokens), spans)


@dataclass(frozen=True)
class RunComparison:
    """Variants beside each other. Training losses are moving averages with one half-life for all runs."""

    variants: list[Variant]
    points: Mapping[Axis, float]
    """Where losses are compared: the largest that every run has got to."""
    half_life_tokens: float
    is_validated: bool
    """Whether every run was measured on held-out data, so that its last loss there is the final one."""
    baseline: Variant
    """What the others are set against, seed by seed."""

    def curve(self, story: RunHistory, axis: Axis) -> tuple[list[float], list[float]]:
        """The averaged loss of a run along an axis."""
        return story.along(axis), smoothed(story, self.half_life_tokens)

    def loss_at(self, variant: Variant, axis: Axis) -> Spread:
        """The averaged losses of a variant's runs at the point of an axis, between records on a straight line."""
        return spread([self._loss_of(story, axis) for story in variant.stories])

    def _loss_of(self, story: RunHistory, axis: Axis) -> float:
        return float(numpy.interp(self.points[axis], *self.curve(story, axis)))

    def against_baseline(self, variant: Variant) -> Spread | None:
        """Loss at equal tokens minus the baseline's of the same seed; None where no seed is common.

        Runs of one seed read the same batches in the same order, so that these are not in the difference.
        """
        theirs = {story.run.seed: self._loss_of(story, "tokens") for story in self.baseline.stories}
        mine = {story.run.seed: self._loss_of(story, "tokens") for story in variant.stories}
        common = mine.keys() & theirs.keys()
        return spread([mine[seed] - theirs[seed] for seed in sorted(common)]) if common else None

    def final(self, variant: Variant) -> Spread:
        """The last validation losses; of the training, where not all runs have one."""
        if self.is_validated:
            return spread([story.told("validation_loss")[-1] for story in variant.stories])
        return spread([smoothed(story, self.half_life_tokens)[-1] for story in variant.stories])


def compare_variants(variants: list[Variant], baseline: str | None = None) -> RunComparison:
    """Find where losses can be compared. The half-life is EMA_HALF_LIFE_SHARE of the tokens that all have seen.

    The baseline is the first variant where none is named. UserError where the name is none of theirs.
    """
    names = [variant.name for variant in variants]
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline {baseline}: no such variant; {nearest(baseline, names)}")
    points = {axis: reached(variants, axis) for axis in POINTS}
    validated = all(story.told("validation_loss") for variant in variants for story in variant.stories)
    against = variants[0 if baseline is None else names.index(baseline)]
    return RunComparison(variants, points, EMA_HALF_LIFE_SHARE * points["tokens"], validated, against)
