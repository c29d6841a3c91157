"""The runs of a sweep as processes, one after the other; a stop signal is handed on to the one under way."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple

from tqdm import tqdm

from mosaic_dist.checkpoint import CheckpointError, newest
from mosaic_dist.compare.sweep_config import PlannedRun
from mosaic_dist.errors import UserError
from mosaic_dist.parallel.world import free_port
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.interruption import INTERRUPTED_EXIT_CODE, STOP_SIGNALS

DEFAULT_LAUNCHER = "deepspeed --master_port {port} --num_gpus 1"
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
"""Where launchers are looked for: first beside the interpreter at work, whose environment may not be activated."""
LOOK_SECONDS = 0.5
TAIL_BYTES = 1 << 18
"""Of a metrics file, in which its last whole record begins."""
LEAVE_SECONDS = 120.0
"""Time that the processes of a run have to end after their launcher has."""


class RunOutcome(NamedTuple):
    """What became of a run, and why where it is not finished."""

    name: str
    state: Literal["finished", "failed", "stopped"]
    reason: str = ""


class Queue:
    """Runs one process at a time, and none any more after a stop signal."""

    def __init__(self) -> None:
        self.is_stopping = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Queue":
        self._before = {number: signal.signal(number, self._stop) for number in (*STOP_SIGNALS, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.is_stopping = True
        self._hand_on()

    def _hand_on(self) -> None:
        """Tell all processes of the run: a launcher may forget its own."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)

    def start(self, words: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, so that Ctrl-C does not reach it; what it prints goes to `log`."""
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PATH": PROGRAMS},
            )
        if self.is_stopping:  # the signal came while it started
            self._hand_on()
        return self._process


class Progress:
    """How far all runs of a sweep are, as a bar; as lines where stderr is no terminal."""

    def __init__(self, planned: Sequence[PlannedRun]):
        self.steps = {one.name: one.run.steps if is_finished(one) else last_step(one) for one in planned}
        total, there = sum(one.run.steps for one in planned), sum(self.steps.values())
        self.bar = tqdm(total=total, initial=there, unit="step", disable=not sys.stderr.isatty())

    def say(self, title: str, text: str) -> None:
        """What begins or ends."""
        self.bar.set_description(title)
        if self.bar.disable:
            print(f"{title}: {text}", file=sys.stderr, flush=True)

    def move(self, one: PlannedRun, step: int) -> None:
        """A run is at this step. One that continues may stand before where it was: at its checkpoint."""
        self.steps[one.name] = step
        self.bar.n = sum(self.steps.values())
        self.bar.refresh()


def run_all(planned: Sequence[PlannedRun], launcher: str) -> list[RunOutcome]:
    """Train what is not finished, in order. UserError where there is no such launcher."""
    program = shlex.split(launcher)[:1]
    if not program or shutil.which(program[0], path=PROGRAMS) is None:
        raise UserError(f"--launcher {launcher!r}: no such program; see --help")
    progress, outcomes = Progress(planned), []
    with Queue() as queue, progress.bar:
        for place, one in enumerate(planned, 1):
            outcomes.append(_advance(one, launcher, queue, progress, f"[{place}/{len(planned)}] {one.name}"))
    return outcomes


def _advance(one: PlannedRun, launcher: str, queue: Queue, progress: Progress, title: str) -> RunOutcome:
    """Finish a run, as far as that can be."""
    if is_finished(one):
        return RunOutcome(one.name, "finished")
    if queue.is_stopping:
        return RunOutcome(one.name, "stopped", "not started")
    one.folder.parent.mkdir(parents=True, exist_ok=True)
    log = one.folder.with_name(f"{one.name}.log")
    progress.say(title, f"starts; {one.run.steps} steps")
    started = time.monotonic()
    process = queue.start([*shlex.split(launcher.replace("{port}", str(free_port()))), *one.command], log)
    while process.poll() is None:
        time.sleep(LOOK_SECONDS)
        progress.move(one, last_step(one))
    _wait_for_session(process.pid)
    outcome = _judge(one, process.returncode, queue.is_stopping, log)
    progress.move(one, one.run.steps if outcome.state == "finished" else last_step(one))
    progress.say(title, f"{outcome.state} after {time.monotonic() - started:.0f} s, step {last_step(one)}")
    return outcome


def _judge(one: PlannedRun, code: int, is_stopping: bool, log: Path) -> RunOutcome:
    """What the exit code, the checkpoints and the log say."""
    if code == 0 and is_finished(one):
        return RunOutcome(one.name, "finished")
    step = last_step(one)
    if code == INTERRUPTED_EXIT_CODE or is_stopping or code == 0:
        return RunOutcome(one.name, "stopped", f"at step {step} of {one.run.steps}; the same command goes on")
    lines = log.read_text(errors="replace").splitlines()
    told = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output")
    return RunOutcome(one.name, "failed", f"exit code {code} at step {step}: {told.strip()} (see {log})")


def is_finished(one: PlannedRun) -> bool:
    """Whether the newest checkpoint is that of the last step, or of a run that its validation loss stopped early."""
    try:
        checkpoint = newest(RunFolder(one.folder).checkpoints)
    except CheckpointError:  # the run itself will say what is wrong with them
        return False
    return checkpoint is not None and (
        checkpoint.step >= one.run.steps or checkpoint.state["progress"]["stopped_early"]
    )


def last_step(one: PlannedRun) -> int:
    """Of the last whole record of the run's metrics; 0 where there is none."""
    path = RunFolder(one.folder).metrics
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        found = re.findall(rb'^\{"step": (\d+).*\}$', file.read(), re.MULTILINE)
    return int(found[-1]) if found else 0


def _wait_for_session(leader: int) -> None:
    """Until no process of a run is left: one that saves holds its folder."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while time.monotonic() < deadline:
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return
        time.sleep(LOOK_SECONDS)
