"""Preparations that end themselves with SIGKILL before a chosen step of writing, in processes forked from one.

`python -m tests.data.killed_preparation TOKENIZER INPUT FOLDER SEED` prepares INPUT at FOLDER/whole undisturbed, then
ten times at FOLDER/<n>: killed at random steps, started again, killed again, and at last left alone. Prints a JSON list
of each one's steps at which it was killed. Forking one process ten times saves as many imports.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

from mosaic_dist.data import encode, journal, mds
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.sources import read_documents
from mosaic_dist.data.tokenizer import Tokenizer, no_threads

STEPS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "open")  # of the module os


def kill_at(step: int) -> list[int]:
    """End this process before its step of that number; returns the counter."""
    count = [0]

    def watched(original):
        def call(*words, **named):
            count[0] += 1
            if count[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*words, **named)

        return call

    for name in STEPS:
        # A killed process loses nothing that it has written, synced or not; so this is quick on a slow disk.
        setattr(os, name, watched((lambda handle: None) if name == "fsync" else getattr(os, name)))
    return count


def attempt(step: int, *words) -> int | None:
    """Steps of a preparation in a forked process; None if it was killed."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        status = 1
        try:
            count = kill_at(step)
            make(*words)
            os.write(write, str(count[0]).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    _, status = os.waitpid(process, 0)
    with os.fdopen(read) as pipe:
        steps = pipe.read()
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert status == 0, "the preparation failed; see its error above"
    return int(steps)


def make(tokenizer: str, source: str, output: Path) -> None:
    """The preparation: many small batches, a journal entry behind each, many small shards."""
    encode.BATCH_BYTES = 3000
    journal.SECONDS, journal.SHARE = 0.0, 1e9
    prepare(
        read_documents([source]),
        Tokenizer.load(tokenizer),
        output,
        16,
        validation_fraction=0.2,
        deduplicate=True,
        min_document_bytes=20,
        workers=1,
        shard_bytes=4000,
    )


def main(tokenizer: str, source: str, folder: str, seed: str) -> None:
    """Prepare once undisturbed, then ten times with kills, and print the steps of each one's kills."""
    no_threads()
    mds.open_writer(str(Path(folder, "imports")), "uint16", 1, None, None).finish()
    shutil.rmtree(Path(folder, "imports"))
    generator = random.Random(int(seed))
    steps = attempt(0, tokenizer, source, Path(folder, "whole"))
    assert steps is not None
    told = []
    for number in range(10):
        output = Path(folder, str(number))
        killed: list[int] = []
        while not output.exists():
            step = generator.randint(1, steps) if len(killed) < 3 else 0
            if attempt(step, tokenizer, source, output) is None:
                killed.append(step)
        told.append(killed)
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
