"""Runs whose model has a part that this process does not know are drawn and compared all the same."""

import json

import pytest

from mosaic_dist.commands.models import export
from mosaic_dist.compare.compare import compare
from mosaic_dist.compare.plot import plot
from mosaic_dist.compare.report import report
from mosaic_dist.errors import UserError
from mosaic_dist.run_spec import read_run
from mosaic_dist.spec import holds_unknown, unknown_parts_kept
from tests.compare.folders import record, write_run

FACTS = {"parameters": 1234, "active_parameters": 567, "flops_per_token": 8e3, "own_parts": {"own_norm": "own.py"}}


@pytest.fixture
def runs(tmp_path):
    """Two seeds of a run whose norm is of a recipe's own kind, and one run of known parts."""
    for name, seed in (("own_seed0", 0), ("own_seed1", 1), ("plain_seed0", 0)):
        folder = write_run(tmp_path / name, [record(step, 3.0 / step) for step in (1, 2, 3)], seed=seed)
        if name != "plain_seed0":
            file = folder / "run.yaml"
            file.write_text(file.read_text().replace("type: rmsnorm", "type: own_norm\n    power: 2"))
            (folder / "environment.json").write_text(json.dumps(FACTS))
    return tmp_path


def test_unknown_parts_are_kept_as_written(runs):
    file = runs / "own_seed0" / "run.yaml"
    with unknown_parts_kept():
        run = read_run(file)
    assert holds_unknown(run.model)
    assert not holds_unknown(run.data)
    assert run.to_yaml() == file.read_text()


def test_plot_compare_and_report_need_no_model(runs, capsys):
    plot(str(runs), output=str(runs / "curves.png"), x="flops")
    compare(str(runs))
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| own |"))
    assert "| 2 |" in row  # both seeds are one variant
    assert "| 1,234 | 567 |" in row
    report(str(runs / "own_seed0"), output=str(runs / "report.html"))
    assert "1,234 in all, 567 active" in (runs / "report.html").read_text()
    (runs / "own_seed0" / "environment.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no flops_per_token, and the model of own_seed0 has parts"):
        compare(str(runs))


def test_what_builds_the_model_asks_for_the_recipe(runs):
    (runs / "own_seed0" / "checkpoints").mkdir()
    with pytest.raises(
        UserError, match=r"run\.yaml: model\.norm\.type: no kind 'own_norm' .*; .* add --recipe own\.py"
    ):
        read_run(runs / "own_seed0" / "run.yaml")
    with pytest.raises(UserError, match=r"--recipe nowhere\.py: there is no such file"):
        export(output=str(runs / "model"), run=str(runs / "own_seed0"), recipe="nowhere.py")
