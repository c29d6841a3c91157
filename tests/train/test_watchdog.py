"""A rank that hangs is named, with its host, its phase and where it is, and the job ends."""

import re
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.tokenizer import train_bpe
from mosaic_dist.parallel import Parallel
from mosaic_dist.train.watchdog import HUNG_EXIT_CODE, Heartbeat, accused
from tests.data.conftest import make_documents
from tests.launch import check, run_ranks
from tests.train.hanging_run import LIMIT_SECONDS

HOST = socket.gethostname()


def check_told(done: list[subprocess.CompletedProcess[str]], folder: Path) -> tuple[str, dict[str, str]]:
    """What was said of the one rank that hangs, and the stacks of each rank."""
    assert 0 not in [process.returncode for process in done]
    told = "".join(process.stdout for process in done)
    assert told.count("the run hangs: 1 of 2 ranks hold the others up") == 1, told
    (place,) = re.findall(r"^  (rank .*(?:\n    \S.*)+)$", told, re.MULTILINE)
    stacks = {path.stem: path.read_text() for path in (folder / "stacks").iterdir()}
    assert "all_reduce" in stacks["rank_00000"]
    return place, stacks


def test_a_run_of_which_a_rank_gets_no_data(tmp_path):
    documents, data, output = make_documents(60), tmp_path / "data", tmp_path / "run"
    prepare(documents, train_bpe(documents, 300), data, 16, validation_fraction=0.2, workers=1)
    done = run_ranks("tests.train.hanging_run", 2, "--data", str(data), "--output", str(output))
    place, stacks = check_told(done, output)
    found = re.match(rf"rank 1 on {HOST}, step 3: for (\d+) s in 'data', in\n", place)
    assert found, place
    assert LIMIT_SECONDS <= int(found[1]) <= LIMIT_SECONDS + 20  # far below what it would sleep
    assert re.search(r"hanging_run.py:\d+ in fetch", place)
    assert "in fetch" in stacks["rank_00001"]


@pytest.mark.parametrize("hang", ["lock", "gone"])
def test_a_rank_that_cannot_speak(tmp_path, hang):
    """It hangs outside Python, with the lock that Python's threads need, or as a whole."""
    done = run_ranks("tests.train.watch_ranks", 2, hang, str(LIMIT_SECONDS), str(tmp_path), "1")
    place, stacks = check_told(done, tmp_path)
    assert place.startswith(f"rank 1 on {HOST}, step ")
    assert "no longer heard of: its node or network is lost, or it hangs outside Python" in place
    assert ("in fetch" in stacks["rank_00001"]) == (hang == "lock")


def test_rank_0_is_stopped(tmp_path):
    """With it stops the store in which the others would look for who hangs: no call to it returns."""
    stopped, waiting = run_ranks("tests.train.watch_ranks", 2, "gone", str(LIMIT_SECONDS), str(tmp_path), "0")
    assert (stopped.returncode, waiting.returncode) == (-signal.SIGKILL, HUNG_EXIT_CODE)
    found = re.search(
        r"step 3: for (\d+) s in 'update', and rank 0 does not answer: its process is stopped", waiting.stdout
    )
    assert found, waiting.stdout
    assert LIMIT_SECONDS <= int(found[1]) <= LIMIT_SECONDS + 20
    assert "all_reduce" in (tmp_path / "stacks" / "rank_00001.txt").read_text()


def test_nothing_is_left_of_a_run_that_went_well(tmp_path):
    check(run_ranks("tests.train.watch_ranks", 2, "never", "3600", str(tmp_path), "1"))
    assert list((tmp_path / "stacks").iterdir()) == []


def test_who_is_accused():
    here = Heartbeat(beat=9, host="a", step=7, part=1, phase="update", seconds=30.0, waits=True, stack="")
    before = [replace(here, beat=8)] * 4
    waits, earlier = here, replace(here, part=0, phase="data", waits=False)
    later = replace(here, step=8, part=3, waits=False)
    assert accused(before, [waits, waits, later, waits]) == ([2], False)
    assert accused(before, [waits, earlier, later, waits]) == ([1], False)
    assert accused(before, [waits, earlier, before[2], None]) == ([2, 3], True)
    assert accused(before, [waits, waits, waits, replace(waits, step=6)]) == ([3], False)
    assert accused(before, [waits] * 4) == ([0, 1, 2, 3], False)


def test_the_limit():
    assert Parallel(timeout_seconds=600).step_limit_seconds == 300
    assert Parallel(timeout_seconds=600, step_timeout_seconds=700).step_limit_seconds == 700
