"""What a run folder tells: axes against sums by hand, and files that are not as they should be."""

import math

import pytest

from mosaic_dist.compare.history import NoRecordsError, duration, labels, read_history
from mosaic_dist.errors import UserError
from mosaic_dist.model import flops_per_token
from recipes.sweeps.small import run as small
from tests.compare.folders import BATCH, experts, record, write_run

STEPS = [(1, 4.0, 2.0), (2, 3.5, 1.0), (5, 3.0, 0.5)]
"""Step, loss, seconds: three steps without a record before the last."""


@pytest.fixture
def folder(tmp_path):
    records = [record(step, loss, seconds) for step, loss, seconds in STEPS]
    records[1] |= {"validation_loss": 3.75, "experts": experts(1, 5)}
    return write_run(tmp_path / "run", records)


def test_axes(folder):
    story = read_history(folder)
    assert story.along("step") == [1, 2, 5]
    assert story.along("tokens") == [BATCH, 2 * BATCH, 5 * BATCH]
    assert story.along("time") == [2.0, 3.0, 3.0 + 3 * 0.5]
    per_token = flops_per_token(small.model, 256)
    assert story.along("flops") == pytest.approx([per_token * BATCH * step for step in (1, 2, 5)])
    assert story.told("validation_loss") == [3.75]
    assert [math.isnan(value) for value in story.column("validation_loss")] == [True, False, True]
    assert story.experts.steps == [2]
    assert all("experts" not in one for one in story.records)


def test_a_cut_last_line_is_left_out(folder):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "tokens"')
    assert read_history(folder).along("step") == [1, 2, 5]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"step": 3, "tok\n', "not a JSON record"),
        (b"\xff\xfe\n", "not a JSON record"),
        (b"7\n", "not a JSON record"),
        (b'{"loss": 3.0}\n', "not a JSON record"),
        (b'{"step": 6, "tokens": 7, "loss": "low", "step_seconds": 1}\n', "loss is 'low'"),
        (b'{"step": 6, "tokens": 7, "step_seconds": 1}\n', "loss is None"),
        (
            b'{"step": 6, "tokens": 7, "loss": 1, "step_seconds": 1, "experts": {"a": {"load": [1]}}}\n',
            "experts is not",
        ),
        (b'{"step": 5, "tokens": 7, "loss": 1, "step_seconds": 1}\n', "step 5 stands behind step 5"),
    ],
)
def test_other_lines_are_named(folder, line, says):
    good = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(good + line + b'{"step": 9}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:4: ") as caught:
        read_history(folder)
    assert says in str(caught.value)
    assert "remove" in str(caught.value)


def test_a_run_without_records_and_what_is_no_run(folder, tmp_path):
    (folder / "metrics.jsonl").write_text('{"step": 1, "to')
    with pytest.raises(NoRecordsError, match=r"metrics\.jsonl has no records"):
        read_history(folder)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(NoRecordsError):
        read_history(folder)
    (folder / "run.yaml").write_text("name: [")
    with pytest.raises(UserError, match=r"run/run\.yaml: not valid YAML"):
        read_history(folder)
    (folder / "run.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"run/run\.yaml: "):
        read_history(folder)
    with pytest.raises(UserError, match="nowhere is no folder"):
        read_history(tmp_path / "nowhere")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    first, other = (write_run(tmp_path / name, [record(1, 2.0)], name="same") for name in ("a", "b"))
    third = write_run(tmp_path / "c", [record(1, 2.0)])
    stories = [read_history(path) for path in (first, other, third)]
    assert labels(stories) == [str(first), str(other), "c"]


def test_durations():
    assert [duration(x) for x in (4.25, 119.6, 3600.0, 90_061.0)] == ["4.2 s", "2 min 0 s", "1 h 0 min", "25 h 1 min"]
