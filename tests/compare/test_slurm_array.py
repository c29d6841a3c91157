"""The sbatch array of a sweep: its syntax, and what `launch.sh` would be given for each job."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from mosaic_dist.compare.history import read_spec
from mosaic_dist.compare.slurm_array import write_array
from mosaic_dist.compare.sweep_config import SweepConfig, plan_runs
from mosaic_dist.errors import UserError
from recipes.sweeps.small import run as small
from tests.launch import ROOT

SHEET = """
recipe: recipes/sweeps/small.py
flags: {data: "it's here", ds_config: ds_configs/zero2.json}
variants:
  plain: {}
  gelu: {model.layers.ffn: {type: gelu, hidden_dim: 64}, expert_parallel: 2}
seeds: [0, 1]
"""
STUB = """
printf '%s\\n' "$RECIPE" "$OUTPUT" "$DATA" "$DS_CONFIG" "${EXPERT_PARALLEL:-none}" "$@"
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The planned runs and their script, in a folder where `launch.sh` tells what it is given."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "sheet.yaml").write_text(SHEET)
    planned = plan_runs(read_spec(SweepConfig, tmp_path / "sheet.yaml"), {}, tmp_path / "out")
    assert write_array(planned, tmp_path / "sheet.yaml", tmp_path / "out") == f"4 runs: sbatch {tmp_path}/out/sweep.sh"
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "launch.sh").write_text(STUB)
    return planned, tmp_path / "out" / "sweep.sh"


def test_each_job_is_one_run(script, tmp_path):
    planned, path = script
    assert "#SBATCH --array=0-3" in path.read_text()
    for i, one in enumerate(planned):
        settings = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": str(i)}
        done = subprocess.run(
            ["bash", path, "--more"], env=os.environ | settings, capture_output=True, text=True, check=True
        )
        degree = "2" if one.name.startswith("gelu") else "none"
        given = [*one.script, str(one.folder), "it's here", "ds_configs/zero2.json", degree]
        assert done.stdout.splitlines() == [*given, *one.words("data", "ds_config", "expert_parallel"), "--more"]


def test_syntax(script):
    _, path = script
    subprocess.run(["bash", "-n", path], check=True)
    assert not [line for line in path.read_text().splitlines() if line != line.rstrip()]
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_it_asks_slurm_for_what_the_job_scripts_ask_for(script):
    """But for the array, and the log's name."""

    def asked(path: Path) -> set[str]:
        return {line.partition("=")[0] for line in path.read_text().splitlines() if line.startswith("#SBATCH")}

    _, path = script
    there = asked(ROOT / "slurm" / "mosaic_small.sh")
    assert asked(path) - there == {"#SBATCH --array"}
    assert there - asked(path) <= {"#SBATCH --cpus-per-task", "#SBATCH --mem", "#SBATCH --exclusive"}


def test_the_recipe_words_of_yaml_runs_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "run.yaml").write_text(small.to_yaml())
    (tmp_path / "sheet.yaml").write_text(f"recipe: {tmp_path}/run.yaml\n")
    planned = plan_runs(read_spec(SweepConfig, tmp_path / "sheet.yaml"), {}, tmp_path / "out")
    write_array(planned, tmp_path / "sheet.yaml", tmp_path / "out")
    (line,) = [line for line in (tmp_path / "out" / "sweep.sh").read_text().splitlines() if line.startswith("  0) ")]
    assert "RECIPE=recipes/train.py" in line
    words = line.partition("words=(")[2].removesuffix(") ;;")
    assert shlex.split(words)[0] == f"--config={tmp_path}/run.yaml"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"slurm/launch\.sh is not here"):
        write_array(planned, tmp_path / "sheet.yaml", tmp_path / "out")
