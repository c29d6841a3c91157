import subprocess
import sys

import pytest

from mosaic_dist.cli import CTRL_C_EXIT_CODE
from mosaic_dist.train import interruption
from mosaic_dist.train.interruption import (
    FAILED_ELSEWHERE_EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    Deadline,
)


def last_asked(monkeypatch: pytest.MonkeyPatch, limit_minutes: float, asked: list[float], saves: list[float]) -> float:
    """The time in seconds at which a deadline first says stop, asked at these times; `saves` come after the first."""
    now = 0.0
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now)
    deadline = Deadline(limit_minutes)
    for now in asked:
        if deadline.is_up():
            return now
        for seconds in saves:
            deadline.add_save(seconds)
    return float("inf")


def test_the_deadline_leaves_room_for_a_step_and_two_saves(monkeypatch):
    every_second = [50.0 + i for i in range(20)]
    assert last_asked(monkeypatch, 1, every_second, []) == 54.0  # 54 + 1 + 60 / 10 > 60
    assert last_asked(monkeypatch, 1, every_second, [0.5, 2.0, 1.0]) == 56.0  # 56 + 1 + 2 * 2 > 60
    assert last_asked(monkeypatch, 1, [20.0, 30.0, 31.0, 45.0, 46.0], [0.1]) == 46.0  # 46 + 14 + 0.2 > 60
    assert last_asked(monkeypatch, 10, every_second, []) == float("inf")


def test_no_deadline():
    assert not any(Deadline(None).is_up() for _ in range(3))


PROGRAM = """
import signal, sys, threading, time
from mosaic_dist.cli import CTRL_C_EXIT_CODE
from mosaic_dist.train import interruption
interruption.some_rank_failed = lambda: sys.argv[1] == "failed"
interruption.dist.is_initialized = lambda: sys.argv[1] != "alone"
interruption.AGAIN_SECONDS = 0.5
signals = interruption.StopSignals()
lock = threading.Lock()
lock.acquire()
for word in sys.argv[2:]:
    threading.Timer(0.1, lambda: signal.raise_signal(signal.Signals[word])).start()
    lock.acquire(timeout=0.3 if word == "SIGINT" else 1.2)  # runs no Python on the main thread, as a collective
print(signals.received)
"""


@pytest.mark.parametrize(
    ("others", "sent", "code", "told"),
    [
        ("alone", ["SIGTERM"], INTERRUPTED_EXIT_CODE, ""),
        ("alone", ["SIGINT"], INTERRUPTED_EXIT_CODE, ""),
        ("failed", ["SIGTERM"], FAILED_ELSEWHERE_EXIT_CODE, ""),
        ("well", ["SIGUSR1", "SIGTERM"], 0, "SIGUSR1\n"),
        ("well", ["SIGINT", "SIGINT", "SIGTERM"], 0, "SIGINT\n"),
        ("well", ["SIGINT", "SIGTERM", "SIGINT"], CTRL_C_EXIT_CODE, ""),
    ],
)
def test_signals(others, sent, code, told):
    """The first is remembered, unless no rank is there to save with; only a late second Ctrl-C ends the process."""
    words = [sys.executable, "-c", PROGRAM, others, *sent]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, told), done.stderr
    assert done.stderr.count("Ctrl-C: the run saves") == (others == "well" and "SIGINT" in sent)
