"""A tokenizer and a dataset that all end-to-end tests share, made by the tools from a part of the standard library."""

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

from mosaic_dist.parallel.world import free_port
from tests.launch import ROOT, clean_environment, run_python, run_ranks

SMALL = (
    "--model.vocab_size 512 --model.dim 32 --model.max_seq_len 32 --model.embedding.rank 16 "
    "--model.layers.attention.heads 2 --model.layers.ffn.expert.hidden_dim 64 --model.layers.ffn.experts 4 "
    "--model.layers.ffn.split 4 --batch_tokens 256 --micro_batch_size 2 --schedule.warmup_steps 2 "
    "--optimizer.learning_rate 1e-2 --steps 12 --validate_every_steps 6 "
    "--validation_samples 6 --checkpoint.every_steps 4 --data.workers 1"
).split()
"""Overrides that make `t4_moe` tiny; its four blocks and all its parts stay."""


def command(*words: str | Path, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Run a command of the README's kind in the repository and wait; a launcher leads a process group of its own."""
    first, *more = (str(word) for word in words)
    if first in ("python", sys.executable):
        return run_python(*more, timeout=timeout)
    return subprocess.run(
        [first, *more],
        cwd=ROOT,
        env=clean_environment(),
        text=True,
        timeout=timeout,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def python(*words: str | Path, timeout: float = 180) -> str:
    """Run this Python with words; its output, after making sure that it went well."""
    done = run_python(*words, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def recipe(folder: Path, data: Path | str, *more: str, small: Sequence[str] = tuple(SMALL)) -> list[str]:
    """The tiny recipe and the words that train it."""
    words = ["--ds_config", "ds_configs/zero2.json", "--data", str(data), "--output", str(folder)]
    return ["recipes/t4_moe.py", *words, *small, *more]


def deepspeed(folder: Path, data: Path | str, *more: str, ranks: int = 2) -> list[str]:
    """The words that train the tiny recipe with the deepspeed launcher, which takes seconds by itself."""
    return ["deepspeed", "--master_port", str(free_port()), "--num_gpus", str(ranks), *recipe(folder, data, *more)]


def train(*words: str, ranks: int = 2, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Run `recipe(...)` as ranks without a launcher; the result has the first failure's exit code and all outputs."""
    program, *more = words
    done = run_ranks(program, ranks, *more, timeout=timeout)
    code = next((process.returncode for process in done if process.returncode > 0), done[0].returncode)
    return subprocess.CompletedProcess(words, code, "".join(process.stdout for process in done))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    source = Path(sysconfig.get_path("stdlib")) / "json"
    python("-m", "data_prep.train_tokenizer", "--input", source, "--vocab_size", "512", "--output", path)
    return path


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("dataset") / "data"
    source = Path(sysconfig.get_path("stdlib")) / "json"
    python(
        "-m",
        "data_prep.tokenize_to_mds",
        "--input",
        source,
        "--tokenizer",
        tokenizer,
        "--output",
        path,
        "--seq_len",
        "32",
        "--workers",
        "1",
        "--validation_fraction",
        "0.2",
    )
    return path
