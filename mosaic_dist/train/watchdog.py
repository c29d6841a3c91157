"""Ends a run that hangs, and says whose fault it is.

Nothing here waits for the store, which rank 0 hosts, for longer than a bound: rank 0 may be what hangs.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from mosaic_dist.parallel import HeartbeatStore, World
from mosaic_dist.parallel.heartbeat_store import PATIENCE_SECONDS

HUNG_EXIT_CODE = 1
LONGEST_INTERVAL_SECONDS = 5.0
GRACE_SECONDS = 1.0
"""Between the message and the end: launchers kill the rest then, and the store ends with rank 0."""
SHOWN_FRAMES, SHOWN_RANKS = 4, 8
COLLECTIVES = (os.path.join("torch", "distributed"), os.path.join("deepspeed", "comm"))
"""Where a thread stands that waits for other ranks."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank tells of itself, again and again."""

    beat: int
    """How many times it has told."""
    host: str
    step: int
    part: int
    """Position of the phase in its step."""
    phase: str
    seconds: float
    """Since the phase began."""
    waits: bool
    """Whether it is in a collective."""
    stack: str
    """Where its main thread is, the innermost calls last."""


class Watchdog:
    """A thread that ends this process when it stays in one phase of a step for longer than `limit_seconds`.

    All ranks wait for a rank that hangs, so all of their watches ring at about the same time; the first tells people
    which rank it is, as far as that can be seen, and where. Each leaves the stacks of its threads in
    `folder/stacks/rank_N.txt`; so does one whose main thread holds Python's global lock, from a thread without Python.
    Every rank makes one.
    """

    def __init__(self, world: World, limit_seconds: float, folder: Path):
        self.world, self.limit_seconds = world, limit_seconds
        self.interval_seconds = min(LONGEST_INTERVAL_SECONDS, limit_seconds / 10)
        self.stacks = folder / "stacks" / f"rank_{world.rank:05d}.txt"
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        self._log = open(self.stacks, "a")  # noqa: SIM115 - a C thread writes to it when Python cannot
        self._board = HeartbeatStore("watch", world.rank, world.size, min(PATIENCE_SECONDS, limit_seconds))
        self._beats, self._at = 0, (0, 0, "start", time.monotonic())
        wait([self._put(self._sign())], self._board.patience_seconds)
        self._arm(0.0)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def enter(self, step: int, phase: str) -> None:
        """Tell that a phase of a step begins."""
        part = self._at[1] + 1 if step == self._at[0] else 0
        self._at = (step, part, phase, time.monotonic())

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()
        self._board.close()
        faulthandler.cancel_dump_traceback_later()
        self._log.close()
        if not self.stacks.stat().st_size:
            self.stacks.unlink()

    def _look(self) -> None:
        while not self._closed.wait(self.interval_seconds):
            sign = self._sign()
            self._arm(sign.seconds)
            self._put(sign)
            if sign.seconds > self.limit_seconds:
                self._end()

    def _arm(self, seconds: float) -> None:
        """Let a thread without Python leave the stacks, should this one come by no more."""
        left = max(0.0, self.limit_seconds - seconds) + 2 * self.interval_seconds
        faulthandler.dump_traceback_later(left, file=self._log)

    def _sign(self) -> Heartbeat:
        step, part, phase, since = self._at
        self._beats += 1
        main = threading.main_thread().ident
        others = {thread.ident for thread in threading.enumerate()} - {main}  # those of the backward pass are not among
        stacks = {
            thread: traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)
            for thread, frame in sys._current_frames().items()
            if thread not in others
        }
        waits = any(place in call.filename for calls in stacks.values() for call in calls for place in COLLECTIVES)
        innermost = list(stacks.get(main or 0, ()))[:SHOWN_FRAMES]
        stack = "\n".join(f"    {call.filename}:{call.lineno} in {call.name}" for call in reversed(innermost))
        seconds = time.monotonic() - since
        return Heartbeat(self._beats, socket.gethostname(), step, part, phase, seconds, waits, stack)

    def _put(self, sign: Heartbeat) -> "Future[None]":
        return self._board.put(json.dumps(asdict(sign)))

    def _read(self) -> list[Heartbeat | None] | None:
        """The signs of all ranks; None where the store does not answer."""
        try:
            texts = self._board.read()
        except Exception:
            return None
        return [None if text is None else Heartbeat(**json.loads(text)) for text in texts]

    def _end(self) -> None:
        """Leave the stacks, hear once more of the others, tell, and end the process."""
        faulthandler.dump_traceback(self._log)
        before = self._read()
        time.sleep(3 * self.interval_seconds)
        sign = self._sign()
        self._put(sign)
        after = None if before is None else self._read()
        where = f"[rank {self.world.rank} on {sign.host}]"
        if before is None or after is None:
            silent = "rank 0 does not answer: its process is stopped or gone, or its node or network is lost"
            print(
                f"{where} {describe(sign)}, and {silent}. This rank was in\n{sign.stack}", file=sys.stderr, flush=True
            )
        elif self._board.is_first_to_fail():
            told = verdict(before, after, self.limit_seconds, self.stacks.parent)
            print(f"{where} {told}", file=sys.stderr, flush=True)
        time.sleep(GRACE_SECONDS)
        sys.stdout.flush()
        os._exit(HUNG_EXIT_CODE)  # the main thread would never come to an end


def describe(sign: Heartbeat) -> str:
    """Where a rank is, and for how long."""
    return f"step {sign.step}: for {sign.seconds:.0f} s in {sign.phase!r}"


def accused(before: Sequence[Heartbeat | None], after: Sequence[Heartbeat | None]) -> tuple[list[int], bool]:
    """The ranks that the others wait for, and whether it is because nothing was heard of them between two looks.

    Else they are those that are in no collective, and of these the ones that are least far. Where that tells nothing
    (all are in a collective), the least far of all.
    """
    silent = [i for i, sign in enumerate(after) if sign is None or sign == before[i]]
    if silent:
        return silent, True
    signs = {i: sign for i, sign in enumerate(after) if sign is not None}
    busy = {i: sign for i, sign in signs.items() if not sign.waits} or signs
    least = min((sign.step, sign.part) for sign in busy.values())
    return [i for i, sign in busy.items() if (sign.step, sign.part) == least], False


def verdict(
    before: Sequence[Heartbeat | None], after: Sequence[Heartbeat | None], limit_seconds: float, stacks: Path
) -> str:
    """What people are told of a run that hangs."""
    ranks, are_silent = accused(before, after)
    lines = [f"the run hangs: {len(ranks)} of {len(after)} ranks hold the others up"]
    for rank in ranks[:SHOWN_RANKS]:
        sign = after[rank]
        if sign is None:
            lines.append(f"  rank {rank}: never heard of")
            continue
        silence = ", and no longer heard of: its node or network is lost, or it hangs outside Python; it was in"
        lines.append(f"  rank {rank} on {sign.host}, {describe(sign)}{silence if are_silent else ', in'}\n{sign.stack}")
    lines += [f"  and {len(ranks) - SHOWN_RANKS} more"] if len(ranks) > SHOWN_RANKS else []
    lines.append(f"the limit is parallel.step_timeout_seconds, {limit_seconds:g} s; the stacks of all are in {stacks}")
    return "\n".join(lines)
