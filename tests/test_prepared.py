"""A prepared process does what a fresh `python` does: arguments, environment, paths, output, exit."""

import signal
import subprocess
import sys
import time

import pytest

from tests.launch import clean_environment
from tests.prepared import PreparedProcess

PROGRAM = """
import atexit, json, os, sys
atexit.register(lambda: print("at exit"))
print(json.dumps([__name__, sys.argv, os.getcwd(), dict(os.environ), sys.path[0], sys.stdin.read()], sort_keys=True))
sys.exit(int(sys.argv[-1]))
"""


@pytest.mark.parametrize("start", [["program.py"], ["-m", "program"]])
def test_it_equals_a_fresh_start(tmp_path, start):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = clean_environment() | {"ONLY_HERE": "1", "PYTHONPATH": str(tmp_path)}
    words = [*start, "--a b", "7"]
    real = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    prepared = PreparedProcess(words, environment, tmp_path / "output", tmp_path)
    assert prepared.wait(60) == real.returncode == 7
    assert (tmp_path / "output").read_text() == real.stdout
    assert "at exit" in real.stdout


def test_it_can_be_killed(tmp_path):
    (tmp_path / "program.py").write_text("import time; print('here', flush=True); time.sleep(60)")
    prepared = PreparedProcess(["program.py"], clean_environment(), tmp_path / "output", tmp_path)
    while not (tmp_path / "output").exists() or "here" not in (tmp_path / "output").read_text():
        assert prepared.poll() is None
        time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        prepared.wait(0.1)
    prepared.kill()
    assert prepared.wait(60) == -signal.SIGKILL
