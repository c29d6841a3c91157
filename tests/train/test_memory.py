"""The peak of a process's memory, against what the kernel says it has while a large block is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mosaic_dist.train import memory
from tests.launch import ROOT, clean_environment

BLOCK = """
import os, sys
from mosaic_dist.train.memory import peak_memory_bytes
before = peak_memory_bytes()
block = b"x" * (512 << 20)
pages = int(open("/proc/self/statm").read().split()[1])
del block
print(before, pages * os.sysconf("SC_PAGE_SIZE"), peak_memory_bytes())
"""

LEAST = 0.99
"""The kernel sums the counters of its processors only now and then: some hundred kB may be missing."""

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own figures are Linux's"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU its memory counts"),
]


def test_the_peak_outlives_the_block():
    done = subprocess.run(
        [sys.executable, "-c", BLOCK], cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=True
    )
    before, resident, peak = map(int, done.stdout.split())
    assert before + (500 << 20) < peak
    assert LEAST * resident <= peak < 1.05 * resident


def test_without_proc_the_figure_is_getrusages(monkeypatch):
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    monkeypatch.setattr(memory, "STATUS", Path("/nowhere"))
    assert LEAST * pages * os.sysconf("SC_PAGE_SIZE") <= memory.peak_memory_bytes() < 1 << 40
