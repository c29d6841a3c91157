import json
import subprocess
import sys
from pathlib import Path

from tests.checkpoint.killed import RANDOM_KILLS


def test_a_killed_save_always_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.killed", str(tmp_path)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Killed before its first, second, ... change of the disk: step 1, then the first save of step 2, then the second.
    each = [tuple(pair) for pair in found["each"]]
    assert len(each) > 30
    assert each == sorted(each)
    assert set(each) == {(1, 10), (2, 20), (2, 21)}
    assert len(found["random"]) == RANDOM_KILLS + 1
    assert found["random"] == sorted(found["random"])
    assert found["random"][-1][0] > 2  # steps; how many depends on the machine
