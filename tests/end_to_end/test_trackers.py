"""Metrics for W&B and TensorBoard: offline, without a login, continued under the same id."""

import importlib.util

import pytest

from tests.end_to_end.conftest import SMALL, command

pytestmark = pytest.mark.timeout(300)


def test_wandb_offline_keeps_its_id(dataset, tmp_path):
    folder = tmp_path / "run"
    words = [
        "python",
        "recipes/t4_moe.py",
        "--data",
        dataset,
        "--output",
        folder,
        *SMALL,
        "--logging.trackers",
        "[wandb]",
    ]
    ids = []
    for stop in ("2", "3"):
        done = command(*words, "--stop_at_step", stop)
        assert done.returncode == 0, done.stdout[-3000:]
        ids.append((folder / "wandb_id").read_text())
    assert ids[0] == ids[1]
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_a_missing_tensorboard_is_told(dataset, tmp_path):
    words = ["python", "recipes/t4_moe.py", "--data", dataset, "--output", tmp_path / "run", *SMALL]
    done = command(*words, "--logging.trackers", "[tensorboard]")
    assert done.returncode == 2
    assert "pip install 'mosaic-dist[tensorboard]'" in done.stdout
