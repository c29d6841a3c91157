"""The script that measures on a GPU: its commands are ones that are there, with flags that they know."""

import importlib
import os
import shutil
import subprocess

import pytest

from mosaic_dist.__main__ import COMMANDS
from mosaic_dist.cli import bind, parse_words
from tests.launch import ROOT

RECORDER = """#!/bin/sh
echo "$@" >> "$RECORD"
case "$*" in *moe_layer*) exit 3;; esac
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> tuple[list[list[str]], subprocess.CompletedProcess[str]]:
    """What the script hands to a `python` that only writes it down, and fails once."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "python").write_text(RECORDER)
    (folder / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(folder / "record")}
    script = ["bash", "benchmarks/gpu.sh", "h200", str(folder)]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    return [line.split() for line in (folder / "record").read_text().splitlines()], done


def test_a_failure_ends_nothing_else(commands):
    words, done = commands
    assert len(words) == 6
    assert done.returncode == 1
    assert done.stdout.count("exit code") == done.stdout.count("exit code 3 (124: over 300 s)") == 1


def test_its_commands_are_known(commands):
    modules = [words[1] for words in commands[0]]
    assert modules[0] == "pytest"
    for dash_m, module, *words in commands[0][1:]:
        assert dash_m == "-m"
        function = module.removeprefix("benchmarks.")
        place = f"{module}.__main__" if module == "benchmarks.training_step" else module
        if module == "mosaic_dist":
            place, _, function = COMMANDS[words.pop(0)].partition(":")
            assert (ROOT / words[0]).is_file()
        bind(getattr(importlib.import_module(place), function), *parse_words(words), module)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian: shellcheck)")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", "benchmarks/gpu.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
