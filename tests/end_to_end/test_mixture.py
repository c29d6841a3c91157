"""A mixture, trained on ranks: stopped, resumed on other ranks, told in the metrics; and a damaged shard."""

import json
import shutil

import pytest

from mosaic_dist.train.metrics import read_metrics
from tests.end_to_end.conftest import recipe, train


@pytest.fixture
def mixed(dataset, tmp_path) -> str:
    shutil.copytree(dataset, tmp_path / "web")
    shutil.copytree(dataset, tmp_path / "code")
    return f"{tmp_path / 'web'}=0.75,{tmp_path / 'code'}=0.25"


def test_a_mixture_is_trained_resumed_and_told(mixed, dataset, tmp_path):
    folder = tmp_path / "run"
    for ranks, more in ((2, ("--stop_at_step", "6")), (1, ())):
        done = train(*recipe(folder, mixed, *more), ranks=ranks)
        assert done.returncode == 0, done.stdout[-4000:]
        assert "waiting for data " in done.stdout
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    samples = json.loads((dataset / "dataset.json").read_text())["splits"]["train"]["samples"]
    for record in records:
        seen = 8 * record["step"]  # 256 tokens in sequences of 32
        assert abs(record["epoch/web"] * samples - 0.75 * seen) < 1
        assert abs(record["epoch/code"] * samples - 0.25 * seen) < 1
        assert 0 <= record["data_share"] == record["data_seconds"] / record["step_seconds"] < 1
    validated = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in validated] == [6, 12]
    for record in validated:
        losses = record["validation_loss/web"], record["validation_loss/code"]
        assert losses[0] == losses[1] == pytest.approx(record["validation_loss"], rel=1e-12)
    done = train(*recipe(folder, mixed.replace("0.75", "0.5")), ranks=1)
    assert done.returncode == 2
    assert "data.streams[0].proportion: 0.75 there, 0.5 here" in done.stdout


def test_a_shard_that_is_damaged_ends_all_ranks_with_its_name(mixed, tmp_path):
    for shard in (tmp_path / "code" / "train").glob("*.mds"):
        content = bytearray(shard.read_bytes())
        content[-3] ^= 4
        shard.write_bytes(content)
    done = train(*recipe(tmp_path / "run", mixed))
    assert done.returncode == 2
    assert done.stdout.count("is damaged: its xxh3_64 is wrong") == 1
    assert f"error: shard {tmp_path}/code/train/shard." in done.stdout
