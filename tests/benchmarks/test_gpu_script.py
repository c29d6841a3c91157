"""The script that measures on a GPU: its commands are known, and its smallest form runs to the end on any machine."""

import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest

from mosaic_dist.__main__ import COMMANDS
from mosaic_dist.cli import bind, parse_words
from tests.launch import ROOT, clean_environment

RECORDER = """#!/bin/sh
echo "$@" >> "$RECORD"
case "$*" in *moe_layer*) echo "RuntimeError: too large"; exit 3;; esac
"""
PARTS = ("probe", "tests", "data", "train", "resume", "step of mosaic_small", "step of gpt2_reference")
PARTS += ("compiled blocks", "MoE layer", "profile of mosaic_small", "profile of gpt2_reference")
CHEAP = PARTS[:5]
"""What runs here in seconds; the others have tests of their own."""


def run_script(folder, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script with its results in a folder."""
    words = ["bash", "benchmarks/gpu.sh", "h200", str(folder)]
    return subprocess.run(words, cwd=ROOT, env=clean_environment() | environment, capture_output=True, text=True)


def rows(printed: str) -> dict[str, str]:
    """The table at the end, by part."""
    lines = printed.rpartition("== parts")[2].splitlines()[1:]
    return {line[:26].strip(): line[26:].strip() for line in lines}


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> tuple[list[list[str]], subprocess.CompletedProcess[str]]:
    """What the script hands to a `python` that only writes it down, and fails once."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "python").write_text(RECORDER)
    (folder / "python").chmod(0o755)
    done = run_script(folder, PATH=f"{folder}:{os.environ['PATH']}", RECORD=str(folder / "record"))
    recorded = [line.split() for line in (folder / "record").read_text().splitlines()]
    return [words for words in recorded if words[0] != "-c"], done


def test_a_failure_ends_nothing_else(commands):
    words, done = commands
    assert len(words) == len(PARTS)
    assert done.returncode == 1
    assert done.stdout.count("exit code") == done.stdout.count("exit code 3 (124: over 90 s)") == 1
    table = rows(done.stdout)
    assert tuple(table) == PARTS
    assert "RuntimeError: too large" in table["MoE layer"]
    assert all(row.startswith("exit 3" if part == "MoE layer" else "exit 0") for part, row in table.items())


def test_parts_without_time_are_left_out(tmp_path):
    done = run_script(tmp_path, LIMIT="4")
    assert done.returncode == 0
    assert set(rows(done.stdout).values()) == {"left out: no time"}


def test_its_commands_are_known(commands):
    for first, *words in commands[0]:
        if first != "-m":
            assert (ROOT / first).is_file()
            continue
        module = words.pop(0)
        if module == "pytest":
            assert [word for word in words if word.endswith(".py")] == gpu_tests()
            continue
        place, function = module, module.rpartition(".")[2]
        if module == "benchmarks.training_step":
            place = f"{module}.__main__"
        if module == "mosaic_dist":
            place, _, function = COMMANDS[words.pop(0)].partition(":")
            assert (ROOT / words[0]).is_file()
        bind(getattr(importlib.import_module(place), function), *parse_words(words), module)


def gpu_tests() -> list[str]:
    """Files of tests for a GPU."""
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.gpu", path.read_text())]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def test_its_smallest_form_runs_to_the_end(tmp_path):
    done = run_script(tmp_path, TINY="1", SLOW="5", ONLY="|".join(CHEAP))
    table = rows(done.stdout)
    assert tuple(table) == CHEAP, done.stdout[-4000:]
    assert all(row.startswith("exit 0") for row in table.values()), done.stdout[-4000:]
    assert done.returncode == 0
    assert "done: step 2" in table["train"]
    assert "done: step 4" in table["resume"]


def test_tests_are_collected_where_streaming_is_missing(tmp_path):
    (tmp_path / "streaming.py").write_text("raise ImportError('not here')\n")
    words = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        *gpu_tests(),
    ]
    environment = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert all(file in done.stdout for file in gpu_tests())


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian: shellcheck)")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", "benchmarks/gpu.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
