"""The command: runs and exports give the same figures, suites go on behind a failure, and mistakes are told."""

import json
import sys

import pytest

from mosaic_dist.commands.models import export
from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.command import evaluate, read_suite, read_task
from mosaic_dist.evaluate.exact_match import ExactMatch
from mosaic_dist.evaluate.harness import Harness, import_harness
from mosaic_dist.evaluate.model_source import ModelSource
from mosaic_dist.evaluate.perplexity import Perplexity
from mosaic_dist.spec import SpecError


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model"
    export(str(path), run=str(run))
    return path


@pytest.mark.parametrize("task", ["perplexity", "exact_match"])
def test_a_run_gives_the_figures_of_its_export(run, exported, sums, tmp_path, task, capsys):
    told = []
    for subject in ({"run": str(run)}, {"model": str(exported)}):
        output = tmp_path / "figures.json"
        evaluate(**subject, task=task, data=str(sums), split="validation", json_output=str(output))
        told.append(json.loads(output.read_text()))
        assert json.dumps(told[-1], indent=2) in capsys.readouterr().out
    assert (told[0].pop("run"), told[0].pop("step"), told[1].pop("model")) == (str(run), 5, str(exported))
    assert told[0] == told[1]


def test_a_suite_goes_on_behind_a_failure(run, exported, sums, tmp_path, capsys):
    suite, output = tmp_path / "suite.yaml", tmp_path / "made" / "here"
    suite.write_text(
        f"models: [{{run: {run}, name: as trained}}, {{model: {exported}}}]\n"
        "evaluations:\n"
        f"- {{type: perplexity, data: {tmp_path / 'nothing.txt'}, name: lost}}\n"
        f"- {{type: perplexity, data: {sums}, stride: 2, name: sums}}\n"
        f"- {{type: exact_match, data: {sums}, samples: 0, limit: 3}}\n"
    )
    with pytest.raises(SystemExit) as ended:
        evaluate(suite=str(suite), output=str(output))
    assert ended.value.code == 1
    table = (output / "results.md").read_text()
    assert table in capsys.readouterr().out
    lines = table.splitlines()
    assert lines[0] == "| evaluation | measure | as trained | model |"
    assert lines[2] == "| lost | - | failed | failed |"
    results = json.loads((output / "results.json").read_text())
    assert [(result["model"], "error" in result) for result in results] == [
        ("as trained", True), ("as trained", False), ("as trained", False),
        ("model", True), ("model", False), ("model", False),
    ]  # fmt: skip
    figures = results[1]["figures"]
    assert figures["perplexity"] == results[4]["figures"]["perplexity"]
    cell = f"{figures['perplexity']:.4f}"
    assert f"| sums | perplexity | {cell} | {cell} |" in lines
    assert f"| exact_match {sums} (test) | exact match | 0.0000 | 0.0000 |" in lines
    assert sum("lost of" in line and "nothing.txt" in line for line in lines) == 2


def test_the_example_suite_can_be_read():
    stated = read_suite("recipes/suites/language_model.yaml", ModelSource(run="runs/x"))
    assert [type(evaluation) for evaluation in stated.evaluations] == [Perplexity, Perplexity, Harness]
    with pytest.raises(UserError, match="names no models"):
        read_suite("recipes/suites/language_model.yaml", None)


def test_words_become_evaluations():
    assert read_task("exact_match", {"data": "d"}) == ExactMatch(data="d")
    assert read_task("lm_eval:a,b", {"shots": 2}) == Harness(tasks=("a", "b"), shots=2)
    for word, options, message in (
        ("perplexty", {"data": "d"}, "did you mean 'perplexity'"),
        ("perplexity:x", {"data": "d"}, "only lm_eval takes names"),
        ("perplexity", {}, "--data: perplexity needs a value"),
        ("perplexity", {"data": "d", "samples": 2}, "--samples: perplexity has no such field"),
        ("perplexity", {"data": "d", "stride": 0}, "--stride: 0 must be at least 1"),
        ("lm_eval", {}, "--tasks: name one or more"),
    ):
        with pytest.raises(UserError, match=message):
            read_task(word, options)
    for fields in ({}, {"model": "a", "run": "b"}, {"model": "a", "step": 3}):
        with pytest.raises(SpecError):
            ModelSource(**fields)


def test_a_missing_harness_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(UserError, match=r"pip install 'mosaic-dist\[eval\]'"):
        import_harness("evaluator")
