"""What a run folder tells of its run: the resolved run, the records of its metrics, and where these lie on an axis."""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mosaic_dist.convert.locate import RUN_YAML, locate
from mosaic_dist.errors import UserError
from mosaic_dist.model import count_parameters, flops_per_token
from mosaic_dist.run_spec import ENVIRONMENT_JSON, Run, read_run, recorded
from mosaic_dist.spec import S, holds_unknown, unknown_parts_kept
from mosaic_dist.train.expert_plot import ExpertHistory, split_experts
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.metrics import each_record

Axis = Literal["step", "tokens", "time", "flops"]
NEEDED = ("step", "tokens", "loss", "step_seconds")
"""Fields that every record has, whatever else it tells."""


class NoRecordsError(UserError):
    """A run that has told nothing yet."""


@dataclass(frozen=True)
class RunHistory:
    """A run as its folder tells it."""

    path: Path
    run: Run
    records: list[dict[str, Any]]
    """In order of steps, without their `experts`."""
    experts: ExpertHistory

    @functools.cached_property
    def parameters(self) -> int:
        """Of the whole model."""
        if holds_unknown(self.run):
            return self._recorded("parameters")
        return count_parameters(self.run.model).total

    @functools.cached_property
    def active_parameters(self) -> int:
        """Those that one token meets."""
        if holds_unknown(self.run):
            return self._recorded("active_parameters")
        return count_parameters(self.run.model).active

    @functools.cached_property
    def flops_per_token(self) -> float:
        """The model's own, forward and backward: those that MFU is made of."""
        if holds_unknown(self.run):
            return self._recorded("flops_per_token")
        return flops_per_token(self.run.model, self.run.seq_len)

    def _recorded(self, key: str) -> Any:
        """What the run's start recorded, for a model with parts that are not known here."""
        found = recorded(self.path)
        if key not in found:
            raise UserError(
                f"{self.path / ENVIRONMENT_JSON} has no {key}, and the model of {self.run.name} has parts that are not "
                "known here; leave this run out"
            )
        return found[key]

    def column(self, key: str) -> list[float]:
        """A figure of all records; NaN where one does not have it."""
        return [record.get(key, math.nan) for record in self.records]

    def told(self, key: str) -> list[float]:
        """A figure of those records that have it."""
        return [record[key] for record in self.records if key in record]

    def along(self, axis: Axis) -> list[float]:
        """Where the records lie on an axis.

        "time" is in seconds of training steps, without validation and saves: a record that stands for several steps
        counts its own for each of them.
        """
        if axis == "time":
            steps = [0, *self.column("step")]
            lasted = [b - a for a, b in itertools.pairwise(steps)]
            return list(itertools.accumulate(n * s for n, s in zip(lasted, self.column("step_seconds"), strict=True)))
        if axis == "flops":
            return [self.flops_per_token * tokens for tokens in self.column("tokens")]
        return self.column(axis)


def read_spec(cls: type[S], path: Path) -> S:
    """A spec that is written as YAML. UserError that names the file where it is none."""
    try:
        return cls.from_yaml(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # a UserError, or no text
        raise UserError(f"{path}: {error}") from None


def read_history(folder: str | Path) -> RunHistory:
    """The story of a run folder, or of the run that a checkpoint lies in.

    UserError for what is neither, and for broken files; NoRecordsError for a run without records.
    """
    found = locate(folder)
    if found.run is None:
        raise UserError(f"{folder} is no run folder but a {found.kind}; give the run's")
    place = RunFolder(found.run)
    with unknown_parts_kept():  # curves and records need no model
        run = read_run(place.run_yaml)
    records, experts = split_experts(_checked(place.metrics))
    if not records:
        raise NoRecordsError(f"{place.metrics} has no records: the run has not taken a step yet")
    return RunHistory(place.path, run, records, experts)


def read_histories(folder: Path) -> tuple[list[RunHistory], list[str]]:
    """The stories of a run, or of the runs in a folder, by name; and the folders there whose runs have told nothing.

    UserError where there is no run.
    """
    runs = sorted(path.parent for path in folder.glob(f"*/{RUN_YAML}")) if not (folder / RUN_YAML).exists() else []
    if not runs:
        return [read_history(folder)], []
    stories, silent = [], []
    for run in runs:
        try:
            stories.append(read_history(run))
        except NoRecordsError:
            silent.append(run.name)
    return stories, silent


def _checked(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, each of them with numbers in what is needed and told, and a later step than the last."""
    before = 0
    for number, record in enumerate(each_record(path), 1):
        figures = dict.fromkeys(NEEDED) | record
        figures.pop("experts", None)
        for key, value in figures.items():
            if not isinstance(value, int | float):
                raise UserError(f"{path}:{number}: {key} is {value!r}, which is no number; remove the line, or mend it")
        try:
            ExpertHistory().add(record["step"], record.get("experts", {}))
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: experts is not whole; remove the line, or mend it") from None
        if record["step"] <= before:
            raise UserError(
                f"{path}:{number}: step {record['step']} stands behind step {before}; remove the older lines"
            )
        before = record["step"]
        yield record


def labels(stories: Sequence[RunHistory]) -> list[str]:
    """A name of each run that tells it from the others: its own, or its folder where two have the same."""
    times = Counter(story.run.name for story in stories)
    return [story.run.name if times[story.run.name] == 1 else str(story.path) for story in stories]


def duration(seconds: float) -> str:
    """A time in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
