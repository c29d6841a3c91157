"""One run in one folder that is killed and started again until it has come to its end."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.chaos.aim import Shot, wait_for
from benchmarks.chaos.job import LONGEST_END_SECONDS, Ending, Job, kill
from mosaic_dist.checkpoint import Checkpoint, CheckpointError, candidates
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.metrics import read_metrics

EVERY_STEPS = 4
STEPS_PER_KILL = 6
"""About what a start comes forward by before it is killed; a run that gets to its end sooner is followed by another."""
LEAST_STEPS = 150
"""Of a run, however few the kills: some seconds on any machine, in which it can be aimed at."""
ENDS_IN_A_ROW = 5
"""So many runs that come to their end before anyone could be killed are a problem of the benchmark."""
END_SECONDS = 30.0
"""When a process was killed, all ranks and readers must be gone within this time."""
FAILURES_IN_A_ROW = 3
EXACT = ("step", "tokens", "loss", "auxiliary_loss", "learning_rate", "grad_norm", "skipped", "validation_loss")

Story = list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """What all launches of the benchmark have in common."""

    launchers: tuple[str, ...]
    ranks: int
    words: list[str]
    """Of the recipe, without the run folder."""
    work: Path
    deadline: float = math.inf
    """On the monotonic clock: nothing is killed any more after that."""

    @property
    def is_over(self) -> bool:
        """Whether the time for kills has passed."""
        return time.monotonic() > self.deadline


@dataclass(frozen=True)
class Kill:
    """A kill and what came of it."""

    mode: str
    met: str
    victims: int
    """Processes that were killed."""
    ending: Ending
    load: float
    """Processes that wanted to run on this machine, averaged over a minute."""
    reached: int
    """The last step in the metrics."""
    complete: int
    """The newest checkpoint just before the kill."""
    left: int
    """The newest checkpoint, read to its last byte, afterwards."""

    @property
    def lost_steps(self) -> int:
        """Steps that have to be done again."""
        return self.reached - self.left

    @property
    def lost_too_many(self) -> bool:
        """Whether more was lost than the steps since the last save."""
        return self.left < self.complete


@dataclass
class Outcome:
    """What the benchmark has found so far."""

    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    problems: list[str] = field(default_factory=list)
    """Everything that must not be, in words."""


def story(folder: Path) -> Story:
    """What must be the same, bit for bit, in two runs of one experiment (not the times)."""
    return [{name: record.get(name) for name in EXACT} for record in read_metrics(RunFolder(folder).metrics)]


def first_difference(found: Story, expected: Story, whole: bool) -> str | None:
    """Where a story is another one; None if it is the same, or as far as it goes where it need not be `whole`."""
    for one, other in zip(found, expected, strict=False):
        for name in EXACT:
            if one.get(name) != other.get(name):
                return f"step {other['step']}: {name} is {one.get(name)!r}, not {other.get(name)!r}"
    if len(found) > len(expected) or (whole and len(found) < len(expected)):
        return f"{len(found)} records, not {len(expected)}"
    return None


def final_files(folder: Path) -> Any:
    """Step, data position and the checksums of every file of the newest checkpoint, all proven."""
    checkpoints = candidates(RunFolder(folder).checkpoints)
    newest = Checkpoint.open(checkpoints[max(checkpoints)])
    newest.verify()
    return json.loads(json.dumps([newest.step, newest.state, newest.manifest["files"]]))


def all_paths(folder: Path) -> set[str]:
    """Every file and folder of a run, but not what git had to say."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "git.diff"}


def newest_step(folder: Path, problems: list[str]) -> int:
    """The newest checkpoint. Any that has its name and is not whole in every byte is a problem."""
    found = 0
    for step, path in candidates(RunFolder(folder).checkpoints).items():
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.verify()
            found = step
        except CheckpointError as error:
            problems.append(f"a checkpoint is damaged: {error}")
    return found


class Campaign:
    """A run folder, and all launches in it."""

    def __init__(self, setting: Setting, name: str, words: list[str], chance: Random, outcome: Outcome):
        self.setting, self.name, self.words, self.chance, self.outcome = setting, name, words, chance, outcome
        self.folder = setting.work / name
        self.launches = 0

    def start(self) -> Job:
        """Launch the run; it goes on from the newest checkpoint."""
        log = self.setting.work / f"{self.name}_{self.launches}.log"
        launcher = self.setting.launchers[self.launches % len(self.setting.launchers)]
        self.launches += 1
        self.outcome.starts += 1
        first = newest_step(self.folder, self.outcome.problems)
        words = self.setting.words + self.words
        return Job(launcher, self.setting.ranks, words, self.folder, log, first)

    def disturb(self, moments: list[str], expected: Story, after_kill: Callable[[Kill], None]) -> None:
        """Start and kill until each of `moments` had its kill (they are taken out), or the run came to its end."""
        failures = 0
        while moments and failures < FAILURES_IN_A_ROW and not self.setting.is_over:
            job = self.start()
            shot = wait_for(moments[0], job, self.chance)
            if shot is not None and kill(shot.victims):
                moments.pop(0)
                failures = 0
                after_kill(self._look_at(job, shot, expected))
            elif self._ended(job):
                return
            else:
                failures += 1

    def finish(self) -> None:
        """Let the run come to its end."""
        self._ended(self.start())

    def _ended(self, job: Job) -> bool:
        """Wait for the end of a launch that nobody kills; whether it was a good one."""
        code = job.launcher.wait()
        self._check_ending(job, job.wait_until_gone())
        self._check_beginning(job)
        if code:
            tail = " / ".join(job.log.read_text(errors="replace").splitlines()[-3:])
            self._problem(job, f"it failed by itself, exit code {code}: {tail}")
        return code == 0

    def _look_at(self, job: Job, shot: Shot, expected: Story) -> Kill:
        """What became of a job that was just shot at."""
        ending = job.wait_until_gone()
        self._check_ending(job, ending)
        if left_behind := sorted(path for path in shot.shared_memory if Path(path).exists()):
            self._problem(job, f"left behind: {', '.join(left_behind)}")
        self._check_beginning(job)
        reached = job.first + job.steps_done()
        left = newest_step(self.folder, self.outcome.problems)
        found = Kill(
            mode=self.name.partition("_")[0],
            met=shot.met,
            victims=len(shot.victims),
            ending=ending,
            load=os.getloadavg()[0],
            reached=reached,
            complete=shot.names.complete,
            left=left,
        )
        self.outcome.kills.append(found)
        if found.lost_too_many:
            self._problem(job, f"{found.lost_steps} steps lost: step {found.complete} was saved, {left} is left")
        if difference := first_difference(story(self.folder), expected, whole=False):
            self._problem(job, difference)
        return found

    def _check_ending(self, job: Job, ending: Ending) -> None:
        """No rank may outlive its job for long, and nothing at all for ever."""
        if ending.ranks_seconds > END_SECONDS:
            self._problem(job, f"ranks or readers lived on for {ending.ranks_seconds:.0f} s")
        if ending.seconds > LONGEST_END_SECONDS:
            self._problem(job, f"processes lived on for {LONGEST_END_SECONDS:.0f} s and were killed")

    def _check_beginning(self, job: Job) -> None:
        """A start must go on from the newest checkpoint there was."""
        began = job.began_at()
        if began is not None and began != job.first:
            self._problem(job, f"it began at step {began}, not at {job.first}")

    def _problem(self, job: Job, text: str) -> None:
        self.outcome.problems.append(f"{job.log.stem}: {text}")

    def compare(self, undisturbed: Path) -> None:
        """Hold the finished run against one that nobody disturbed; differences become problems."""
        found = [first_difference(story(self.folder), story(undisturbed), whole=True)]
        if final_files(self.folder) != final_files(undisturbed):
            found.append("the files of the last checkpoint differ")
        if more := sorted(all_paths(self.folder) - all_paths(undisturbed)):
            found.append(f"left in the folder: {', '.join(more)}")
        if fewer := sorted(all_paths(undisturbed) - all_paths(self.folder)):
            found.append(f"missing in the folder: {', '.join(fewer)}")
        self.outcome.problems += [f"{self.name}: {text}" for text in found if text]
