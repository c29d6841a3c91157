"""Exact match against counting by hand, and the command on a model that has learnt its rows by heart."""

import json
from pathlib import Path

import pytest

from mosaic_dist.evaluate.exact_match import Answer, summarize
from mosaic_dist.train.metrics import read_metrics
from tests.end_to_end.conftest import command, python


def test_the_summary_counts_by_length():
    answers = [
        Answer("1+1=", "2", "2"),
        Answer("5+5=", "10", "11"),
        Answer("6+5=", "11", "11"),
        Answer("1+2=", "3", ""),
    ]
    assert summarize(answers) == {
        "exact_match": 0.5,
        "questions": 4,
        "by_answer_length": {
            "1": {"exact_match": 0.5, "questions": 2},
            "2": {"exact_match": 0.5, "questions": 2},
        },
    }


@pytest.mark.timeout(300)
def test_a_model_learns_rows_by_heart_and_says_so_while_training(tmp_path: Path):
    data, run, model, figures = (tmp_path / name for name in ("data", "run", "model", "figures.json"))
    python("-m", "data_prep.arithmetic", "--output", data, "--samples", "60", "--high", "9", "--seq_len", "16",
           "--validation_fraction", "0.35")  # fmt: skip
    words = ("--steps", "120", "--schedule.warmup_steps", "10", "--batch_tokens", "576", "--micro_batch_size", "36")
    done = command(
        "python", "recipes/arithmetic_mixtral.py", "--data", data, "--output", run, *words,
        "--validate_every_steps", "40", "--early_stopping_patience", "0", "--checkpoint.keep_best", "0",
        "--model.layers.dropout", "0.0", "--model.layers.attention.dropout", "0.0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    python("-m", "mosaic_dist", "export", "--run", run, "--output", model)
    shown = python(
        "-m", "mosaic_dist", "evaluate", "--model", model, "--data", data, "--split", "train", "--json_output", figures
    )
    found = json.loads(figures.read_text())
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    assert found["questions"] == len(rows) == 36
    assert found["exact_match"] == 1.0
    assert "exact match" in done.stdout
    told = {record["step"]: record.get("validation_exact_match") for record in read_metrics(run / "metrics.jsonl")}
    assert [step for step, share in told.items() if share is not None] == [40, 80, 120]
    python("-m", "mosaic_dist", "evaluate", "--model", model, "--data", data, "--split", "validation",
           "--json_output", figures)  # fmt: skip
    found = json.loads(figures.read_text())
    assert 0 < told[120] == found["exact_match"] < 1
    assert f"{rows[0]['prompt']}{rows[0]['target']}  (right)" in shown
