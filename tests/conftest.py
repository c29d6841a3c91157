"""What holds for all tests."""

import signal
from pathlib import Path

import pytest
import torch

LONGEST = ("end_to_end/test_readme.py", "slurm/test_jobs.py", "end_to_end/test_resume.py", "parallel/test_equality.py")
"""Files of minutes: begun first, so that no worker is left with one of them at the end."""


def pytest_configure() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would all processes that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files go first. Tests marked `gpu` are skipped where there is none."""
    here = Path(__file__).parent
    ranks = {here / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
