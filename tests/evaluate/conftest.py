"""A run of a few steps on sums, whose model is none of transformers' architectures."""

import sys
from pathlib import Path

import pytest

from mosaic_dist.data.arithmetic import prepare_arithmetic
from mosaic_dist.data.expressions import Expressions
from tests.end_to_end.conftest import command


def make_sums(path: Path, samples: int = 100) -> None:
    """A dataset of sums of two digits, of which there are 100, in the vocabulary of `tests.train.expert_run`."""
    prepare_arithmetic(Expressions(high=9), path, samples, seq_len=16)


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sums") / "data"
    make_sums(path)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory, sums) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    words = ("-m", "tests.train.expert_run", "--data", sums, "--output", path, "--micro_batch_size", "8")
    done = command(sys.executable, *words, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    return path
