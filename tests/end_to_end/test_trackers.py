"""Metrics for W&B and TensorBoard: offline, without a login, continued under the same id."""

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mosaic_dist.train.metrics import read_metrics
from mosaic_dist.train.trackers import TensorboardTracker
from tests.end_to_end.conftest import SMALL, command

pytestmark = pytest.mark.timeout(300)


def test_a_run_tells_both(dataset, tmp_path):
    """W&B is offline and keeps its id over a resumption; TensorBoard's files hold what metrics.jsonl holds."""
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
        "[wandb, tensorboard]",
    ]
    ids = []
    for stop in ("2", "3"):
        done = command(*words, "--stop_at_step", stop)
        assert done.returncode == 0, done.stdout[-3000:]
        ids.append((folder / "wandb_id").read_text())
    assert ids[0] == ids[1]
    logs = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 2
    for log in logs:  # names and values as they lie side by side in the file
        content = log.read_bytes()
        assert re.search(rb"experts/layers\.3/max_over_mean\W{1,8}[1-4](\.\d|\W)", content)
        assert re.search(rb'experts/layers\.0/load.{1,16}"histogram"\n', content, re.DOTALL)
    told = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("loss")
    records = read_metrics(folder / "metrics.jsonl")
    assert [(event.step, event.value) for event in told] == [
        (record["step"], pytest.approx(record["loss"], rel=1e-6)) for record in records
    ]
    assert len(told) == 3


def test_tensorboard_gets_numbers_and_histograms(tmp_path):
    tracker = TensorboardTracker(None, tmp_path)
    tracker.write(7, {"experts/layers.1/dead": 0.25}, {"experts/layers.1/load": [0, 3, 3, 6]})
    tracker.writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("experts/layers.1/dead")] == [(7, 0.25)]
    (event,) = events.Histograms("experts/layers.1/load")
    histogram = event.histogram_value
    assert (event.step, histogram.min, histogram.max, histogram.num, histogram.sum) == (7, 0, 6, 4, 12)


def test_a_missing_tensorboard_is_told(dataset, tmp_path, monkeypatch):
    (tmp_path / "tensorboard.py").write_text("raise ModuleNotFoundError('not installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["python", "recipes/t4_moe.py", "--data", dataset, "--output", tmp_path / "run", *SMALL]
    done = command(*words, "--logging.trackers", "[tensorboard]")
    assert done.returncode == 2
    assert "pip install 'mosaic-dist[tensorboard]'" in done.stdout
