"""Waiting for the moment in which a launch is to be killed, and choosing whom."""

import time
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from benchmarks.chaos.job import Job, Names, Process

MOMENTS = ("save", "deletion", "step", "data", "start-up")
MOST_STEPS = 6
"""A launch does between one and so many steps before its moment is waited for, unless that comes before all steps."""
PATIENCE_STEPS = 24
"""After so many steps of a launch in which the moment was not met, it is killed where it is."""
PATIENCE_SECONDS = 240.0
LATEST_START_SECONDS = 25.0
"""Kills in the start-up fall into so many seconds after the first rank has begun to import."""
STEP_SECONDS, SAVE_SECONDS, FIRST_READ_SECONDS = 0.3, 0.04, 0.5
"""Within these times a kill is random once its moment has come. The order of magnitude is enough."""


class Shot(NamedTuple):
    """A kill: whom it takes, whether a step was done before, and what lay in the folder at that instant."""

    victims: list[Process]
    met: str
    """The moment that it truly was."""
    names: Names
    shared_memory: set[str]
    """What the launch had in /dev/shm shortly before."""


def wait_for(moment: str, job: Job, chance: Random) -> Shot | None:
    """Wait until `job` is in a moment; None if it ends before. The caller kills at once.

    The victim is a random rank, a random reader where data are read, rank 0 where it deletes (no other does), and in
    one case of five the whole node: every process of the launch.
    """
    early = moment == "data" and chance.random() < 0.5
    if not _until(job, lambda: len(job.ranks()) > 0, 0.02):
        return None
    if moment == "start-up":
        if not _until_time(job, chance.uniform(0, LATEST_START_SECONDS)):
            return None
    elif early:  # a single reader may be no reader, but what will be git
        if not _until(job, lambda: len(job.readers()) > 1, 0.02) or not _until_time(
            job, chance.uniform(0, FIRST_READ_SECONDS)
        ):
            return None
    else:
        steps = chance.randint(1, MOST_STEPS)
        if not _until(job, lambda: job.steps_done() >= steps, 0.02):
            return None
    return _take(moment, early, job, chance)


def _take(moment: str, early: bool, job: Job, chance: Random) -> Shot | None:
    """Choose the victims first, which takes long, and then wait for the instant."""
    ranks, readers, everyone = job.ranks(), job.readers(), job.processes()
    if not ranks or job.is_over():
        return None
    victims = [chance.choice(ranks)]
    if chance.random() < 0.2:
        victims = everyone
    elif moment == "data" and readers and not (early and chance.random() < 0.5):
        victims = [chance.choice(readers)]
    elif moment == "deletion":
        victims = ranks[:1]
    has_stepped, shared_memory = job.steps_done() > 0, job.shared_memory()
    if moment == "step" or (moment == "data" and not early):
        time.sleep(chance.uniform(0, STEP_SECONDS))
    elif moment == "save":
        _until(job, lambda: _is_saving_after(job, chance.uniform(0, SAVE_SECONDS)), 0.0005)
    elif moment == "deletion":
        _until(job, lambda: job.names().is_deleting, 0)
    names = job.names()
    return Shot(victims, _met(names, has_stepped, bool(readers), victims[0].is_reader), names, shared_memory)


def _is_saving_after(job: Job, delay_seconds: float) -> bool:
    """Whether a save is under way, and still is a moment later."""
    if not job.names().is_saving:
        return False
    time.sleep(delay_seconds)
    return job.names().is_saving


def _met(names: Names, has_stepped: bool, has_readers: bool, is_reader: bool) -> str:
    """The moment of a kill, by what was seen just before."""
    if is_reader:
        return "data"
    if names.is_deleting or names.is_saving:
        return "deletion" if names.is_deleting else "save"
    if has_stepped:
        return "step"
    return "data" if has_readers else "start-up"


def _until(job: Job, holds: Callable[[], bool], look_seconds: float) -> bool:
    """Wait until something holds, the job is over (False), or patience is; how often it looks is up to the caller."""
    deadline, looks = time.monotonic() + PATIENCE_SECONDS, 0
    while not holds():
        looks += 1
        if look_seconds or looks % 1000 == 0:
            time.sleep(look_seconds)
            if job.is_over():
                return False
            if time.monotonic() > deadline or (looks % 100 == 0 and job.steps_done() >= PATIENCE_STEPS):
                return True
    return True


def _until_time(job: Job, seconds: float) -> bool:
    """Wait so long, or until the first step is done; False if the job is over before."""
    end = time.monotonic() + seconds
    return _until(job, lambda: time.monotonic() > end or job.steps_done() > 0, 0.02)
