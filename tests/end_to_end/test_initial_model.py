"""A run that starts from an exported model: its first loss is that model's, on any cluster, and it starts but once."""

import shutil
from pathlib import Path

import pytest
import torch

from mosaic_dist.convert import load_exported
from mosaic_dist.data.stream import Loader
from mosaic_dist.run_spec import Run
from mosaic_dist.train.metrics import read_metrics
from tests.end_to_end.conftest import SMALL, command, python, recipe, train

STARTS = "starting from the weights in"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, dataset) -> Path:
    folder = tmp_path_factory.mktemp("first")
    words = ("--output", folder / "run", *SMALL, "--stop_at_step", "4", "--validate_every_steps", "0")
    python("recipes/t4_moe.py", "--data", dataset, *words)
    python("-m", "mosaic_dist", "export", "--run", folder / "run", "--output", folder / "model")
    return folder / "model"


def first_loss(run_folder: Path, model: Path) -> float:
    """What one process without DeepSpeed gets from the model on the run's first batch."""
    run = Run.from_yaml((run_folder / "run.yaml").read_text())
    loader = Loader(
        run.data, run.data.load(), seq_len=run.seq_len, global_batch=run.batch_sequences, rank=0, world_size=1,
        seed=run.seed,
    )  # fmt: skip
    batch = next(iter(loader))
    with torch.no_grad():
        return load_exported(model)(batch.inputs_BT, batch.targets_BT).cross_entropy_sum.item() / run.batch_tokens


def losses(run_folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_folder / "metrics.jsonl")]


def test_ranks_start_from_it_and_go_on_without_it(exported, dataset, tmp_path):
    """Two ranks with expert parallelism and ZeRO-3; the folder of the weights is gone before the second start."""
    folder, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(exported, model)
    words = recipe(folder, dataset, "--init_from", str(model), "--seed", "7")
    words[words.index("ds_configs/zero2.json")] = "ds_configs/zero3.json"
    done = train(*words, "--stop_at_step", "2")
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count(f"{STARTS} {model}") == 1
    assert "expert parallel 2, ZeRO 3" in done.stdout
    assert losses(folder)[0] == pytest.approx(first_loss(folder, model), abs=1e-5)
    assert losses(folder)[0] < 6.15  # a fresh model has ln 512 = 6.24
    shutil.rmtree(model)
    done = train(*words, "--stop_at_step", "3")
    assert done.returncode == 0, done.stdout[-4000:]
    assert STARTS not in done.stdout
    assert len(losses(folder)) == 3
    assert f"init_from: {model}" in (folder / "run.yaml").read_text()


def test_one_process_starts_from_it_and_another_run_does_not_become_it(exported, dataset, tmp_path):
    folder = tmp_path / "run"
    words = ["python", "recipes/t4_moe.py", "--data", dataset, "--output", folder, *SMALL, "--stop_at_step", "1"]
    done = command(*words, "--init_from", exported)
    assert done.returncode == 0, done.stdout[-4000:]
    assert losses(folder) == [pytest.approx(first_loss(folder, exported), abs=1e-5)]
    other = command(*words)
    assert other.returncode == 2
    assert f"init_from: '{exported}' there, '' here" in other.stdout
