"""Every command of the README, as a newcomer types it, in a copy of the repository."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch import ROOT, clean_environment, run_python

COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines()
]
DEMO = "recipes/demo.sh stdlib 6"
"""What `make demo` runs, for few steps: its full length is for people."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository without its environment, so that nothing lands in the real one."""
    folder = tmp_path_factory.mktemp("readme") / "repository"
    kept_out = shutil.ignore_patterns(".venv*", ".git", "demo", "runs", "work", "__pycache__", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=kept_out)
    return folder


def run(line: str, folder: Path) -> str:
    """Output of a command in the copy, after making sure that it went well."""
    first, *words = shlex.split(line)
    if first == "python":
        done = run_python(*words, timeout=400, root=folder)
    else:
        done = subprocess.run(
            [first, *words],
            cwd=folder,
            env=clean_environment() | {"PYTHONPATH": str(folder)},
            text=True,
            timeout=400,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    assert done.returncode == 0, f"$ {line}\n{done.stdout[-4000:]}"
    return done.stdout


def test_the_commands_are_those_we_know():
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert len(COMMANDS) > 8


def test_step_by_step(copy):
    for line in COMMANDS[2:]:
        run(line, copy)
    assert (copy / "work/run/loss.png").exists()
    assert (copy / "work/model/model.safetensors").exists()


def test_demo(copy):
    makefile = (ROOT / "Makefile").read_text()
    assert 'bash recipes/demo.sh "$(CORPUS)" $(STEPS)' in makefile
    assert "CORPUS ?= stdlib" in makefile
    output = run(f"bash {DEMO}", copy)
    assert "steps 0 to 3 of 6" in output
    assert "steps 3 to 6 of 6" in output
    assert "def main(" in output
    assert (copy / "demo/stdlib/run/loss.png").exists()


def test_ci_runs_the_test_command():
    assert "make test test-oldest" in (ROOT / ".ci/run").read_text().splitlines()
