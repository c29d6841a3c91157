"""What ends a start of a run before its last step: a signal to any rank, or the clock."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

import torch.distributed as dist

from mosaic_dist.cli import CTRL_C_EXIT_CODE
from mosaic_dist.parallel import rank_from_environment, some_rank_failed

INTERRUPTED_EXIT_CODE = 75
"""Of a run that saved and stopped because it was told to: "start me again" (EX_TEMPFAIL of sysexits.h).

Launchers use 1, 2 and 126 to 255 themselves, and our errors 1 and 2.
"""
FAILED_ELSEWHERE_EXIT_CODE = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What Slurm sends before it takes a node away (`--signal=USR1@60`, preemption), and launchers to end their ranks."""
AGAIN_SECONDS = 2.0
"""Within this time of the first SIGINT others mean nothing: launchers hand on theirs to ranks that got it already."""
LOOK_SECONDS = 1.0

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopSignals:
    """Remembers for the end of the step that a stop signal or Ctrl-C came; installed for the rest of the process.

    Signals after the first change nothing, so they cannot tear a save; but a second Ctrl-C ends the process at once.
    Make it on the main thread. A process that a launcher has started gets a signal when the launcher is killed: nobody
    would end it, and it would hold the run folder.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first that came to this process."""
        self._is_settled = False
        self._interrupted_at: float | None = None
        read_end, write_end = socket.socketpair()
        write_end.setblocking(False)
        self._ends = (read_end, write_end)  # the descriptors live as long as this
        signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop signals", daemon=True).start()
        for number in (*STOP_SIGNALS, signal.SIGINT):
            signal.signal(number, self._remember)
        if "RANK" in os.environ and sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def settle(self) -> None:
        """Training is over for all ranks: from here on the signals are ignored, but for a second Ctrl-C.

        A launcher sends SIGTERM when the first rank has ended with our exit code, to others on their way out.
        """
        self._is_settled = True
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def _watch(self) -> None:
        """Act on what the main thread cannot: it may wait for another rank, in a call where no Python runs."""
        is_first = True
        while True:
            numbers = self._ends[0].recv(64)
            if signal.SIGINT in numbers:
                self._interrupt()
            if is_first and any(number in numbers for number in (*STOP_SIGNALS, signal.SIGINT)):
                is_first = False
                threading.Thread(target=self._leave_if_alone, name="stop signals", daemon=True).start()

    def _interrupt(self) -> None:
        """Say what the first Ctrl-C does; end the process on a second one."""
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if not self._is_settled and dist.is_initialized() and rank_from_environment() == 0:
                print(FIRST_CTRL_C, file=sys.stderr, flush=True)
        elif now - self._interrupted_at > AGAIN_SECONDS:
            os._exit(CTRL_C_EXIT_CODE)

    def _leave_if_alone(self) -> None:
        """Leave at once where no processes have met, or another rank has failed, which the main thread may wait for.

        Launchers give each process 30 s before they kill it, some one process after the other.
        """
        while not self._is_settled:
            if not dist.is_initialized():  # nothing has begun that could be saved
                os._exit(INTERRUPTED_EXIT_CODE)
            if some_rank_failed():
                os._exit(FAILED_ELSEWHERE_EXIT_CODE)
            time.sleep(LOOK_SECONDS)


FIRST_CTRL_C = (
    "\nCtrl-C: the run saves at the end of this step and stops; another Ctrl-C ends it at once without saving. "
    "A launcher kills ranks that take longer than 30 s."
)


class Deadline:
    """The wall clock of a start that may take `max_minutes`, counted from here on; None for no limit.

    Time is up at the end of a step after which another one, as long as the longest so far with all that came between
    two steps (validation, a save), and then the last save might not fit. For that save twice the longest one so far is
    set aside, and before the first a tenth of the whole time.
    """

    def __init__(self, max_minutes: float | None):
        self.limit_seconds = None if max_minutes is None else 60 * max_minutes
        self.started = time.monotonic()
        self.save_seconds: float | None = None
        """The longest save so far."""
        self._longest = 0.0
        self._last: float | None = None

    def add_save(self, seconds: float) -> None:
        """Tell how long a save took."""
        self.save_seconds = max(seconds, self.save_seconds or 0.0)

    def is_up(self) -> bool:
        """Whether to stop here. Asked once at the end of each step: it measures the time between."""
        now = time.monotonic()
        if self._last is not None:  # the first step also compiles and starts the readers
            self._longest = max(self._longest, now - self._last)
        self._last = now
        if self.limit_seconds is None:
            return False
        save = self.limit_seconds / 10 if self.save_seconds is None else 2 * self.save_seconds
        return now - self.started + self._longest + save > self.limit_seconds
