"""Trackers never hold up or end a run: without a network, with errors, with a service that does not come to its end."""

import os
import sys
import time
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mosaic_dist.figure import publish, pyplot
from mosaic_dist.spec import override
from mosaic_dist.train import trackers
from mosaic_dist.train.trackers import Guarded, TensorboardTracker, WandbTracker, close_trackers, make_trackers
from tests.end_to_end.conftest import command
from tests.evaluate.conftest import make_sums
from tests.train.expert_run import run


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    path = tmp_path_factory.mktemp("sums") / "data"
    make_sums(path)
    return path


def train(data, folder, *more: str):
    words = ("--data", data, "--output", folder, "--micro_batch_size", "8", "--logging.trackers", "[wandb]", *more)
    started = time.monotonic()
    done = command(sys.executable, "-m", "tests.train.expert_run", *words)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout, time.monotonic() - started


def pictures(folder) -> dict[str, bytes]:
    """By their names in W&B; a file there is NAME_STEP_DIGEST.png."""
    found = sorted((folder / "wandb").glob("*/files/media/images/*.png"), key=os.path.getmtime)
    return {path.name.partition("_")[0]: path.read_bytes() for path in found}


def test_without_a_network_the_metrics_are_kept_offline_under_one_id(sums, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    settings = {"MODE": "online", "BASE_URL": "http://127.0.0.1:9", "API_KEY": 40 * "0", "INIT_TIMEOUT": "2"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    told, seconds = train(sums, folder, "--stop_at_step", "3")
    assert told.count("warning: W&B keeps the metrics offline") == 1
    assert "done: step 3" in told
    first = (folder / "wandb_id").read_text()
    monkeypatch.setenv("WANDB_MODE", "offline")
    told, offline_seconds = train(sums, folder)
    assert seconds - offline_seconds < 45
    assert "warning" not in told
    assert (folder / "wandb_id").read_text() == first
    assert len(list((folder / "wandb").glob(f"offline-run-*-{first}/*.wandb"))) == 2
    drawn = pictures(folder)
    assert drawn == {name: (folder / f"{name}.png").read_bytes() for name in ("loss", "experts")}


class Failing:
    """A service whose every call fails."""

    def __init__(self):
        self.calls = []

    def write(self, step, values, loads):
        self.calls.append(step)
        raise ConnectionError("gone")

    def close(self, plots):
        self.calls.append("close")


def test_an_error_is_told_once_and_ends_the_tracker(capsys):
    failing = Failing()
    guarded = Guarded("wandb", failing)
    for step in (1, 2, 3):
        guarded.write(step, {"loss": 1.0}, {})
    guarded.close([])
    assert failing.calls == [1]
    told = capsys.readouterr().err
    assert told == "warning: wandb gets no more metrics, because of an error at step 1: ConnectionError: gone\n"


class Service:
    """What the package wandb does for a tracker, with an end that does not come."""

    def __init__(self, finish_seconds: float):
        self.logged, self.finish_seconds, self.id = [], finish_seconds, "some-id"

    def init(self, **settings):
        self.settings = settings
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        time.sleep(self.finish_seconds)

    def Histogram(self, load):
        return ("histogram", load)

    def Image(self, path):
        return ("image", path)


def test_an_end_that_does_not_come_is_not_waited_for(tmp_path, monkeypatch, capsys):
    service = Service(finish_seconds=30.0)
    monkeypatch.setitem(sys.modules, "wandb", service)
    for name in ("MODE", "SILENT", "INIT_TIMEOUT"):
        monkeypatch.setenv(f"WANDB_{name}", "1")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "0.2")
    monkeypatch.setattr(trackers, "GRACE_SECONDS", 0.1)
    (tmp_path / "loss.png").write_bytes(b"")
    (tmp_path / "wandb_id").write_text("some-id")
    tracker = WandbTracker(run, tmp_path)
    assert (service.settings["id"], service.settings["config"]) == ("some-id", run.to_dict())
    tracker.write(4, {"loss": 2.0}, {"load": [1, 2]})
    started = time.monotonic()
    close_trackers([tracker], [tmp_path / "loss.png", tmp_path / "experts.png"])
    assert time.monotonic() - started < 5
    assert service.logged == [
        (4, {"loss": 2.0, "load": ("histogram", [1, 2])}),
        (4, {"loss": ("image", str(tmp_path / "loss.png"))}),
    ]
    assert "wandb sync" in capsys.readouterr().err


def test_a_service_that_cannot_begin_is_done_without(tmp_path, monkeypatch, capsys):
    begun = []

    def init(**settings):
        begun.append(settings)
        raise OSError("disk full")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert make_trackers(override(run, {"logging.trackers": ["wandb"]}), tmp_path) == []
    assert len(begun) == 1
    assert "warning: wandb gets no metrics" in capsys.readouterr().err


def test_tensorboard_shows_steps_that_were_done_anew_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = TensorboardTracker(None, tmp_path)
    for step in (1, 2, 3):
        tracker.write(step, {"loss": float(step)}, {})
    tracker.go_back(1)
    tracker.write(2, {"loss": 20.0}, {})
    close_trackers([tracker], [])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 20.0)]


def test_tensorboard_gets_the_pictures(tmp_path):
    figure, axes = pyplot.subplots(figsize=(2, 1))
    axes.plot([1, 2])
    publish(figure, tmp_path / "loss.png")
    tracker = TensorboardTracker(None, tmp_path)
    tracker.write(7, {"loss": 0.25}, {})
    close_trackers([tracker], [tmp_path / "loss.png"])
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("loss")
    assert (event.step, event.width, event.height) == (7, 240, 120)
