"""A checkpoint that two ranks have written together."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.ranks import WORLD_SIZE


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo ranks have left behind; one launch for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    words = [sys.executable, "-m", "tests.checkpoint.ranks", str(folder)]
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen([*words, str(rank)], cwd=root, stderr=subprocess.PIPE, text=True) for rank in range(WORLD_SIZE)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=60)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
    return folder
