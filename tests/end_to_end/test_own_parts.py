"""A part that a recipe or an installed package defines: trained, and exported by whoever names the recipe."""

import json
import os
import subprocess
import sys

from tests.end_to_end.conftest import SMALL, command, python
from tests.launch import ROOT, clean_environment

PART = """
from torch import nn

from mosaic_dist.model.norm import Norm


class OwnNorm(Norm, type="own_norm"):
    def build(self, dim):
        return nn.LayerNorm(dim, bias=False)
"""
RECIPE = f"""
from dataclasses import replace
{PART}
from mosaic_dist.run import main
from recipes.t4_moe import run as base

run = replace(base, name="own", model=replace(base.model, norm=OwnNorm()))

if __name__ == "__main__":
    main(run)
"""


def test_a_part_of_a_recipe_is_trained_and_exported(tmp_path, dataset):
    recipe, run, model = tmp_path / "own.py", tmp_path / "run", tmp_path / "model"
    recipe.write_text(RECIPE)
    words = ["--data", dataset, "--output", run, *SMALL, "--stop_at_step", "1", "--validate_every_steps", "0"]
    trained = subprocess.run(
        [sys.executable, *map(str, [recipe, *words])],
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=180,
        check=False,
    )
    assert trained.returncode == 0, trained.stderr[-4000:]
    assert f"own_norm is defined in {recipe}" in trained.stdout + trained.stderr
    assert json.loads((run / "environment.json").read_text())["own_parts"] == {"own_norm": str(recipe)}
    export = ["-m", "mosaic_dist", "export", "--run", run, "--output", model]
    refused = command(sys.executable, *export)
    assert refused.returncode == 2
    assert refused.stdout.rstrip().endswith(f"add --recipe {recipe}")
    assert "exported step 1 of own" in python(*export, "--recipe", recipe)


def test_a_part_of_an_installed_package_is_found(tmp_path):
    (tmp_path / "own_package.py").write_text(PART)
    facts = tmp_path / "own_package-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[mosaic_dist.parts]\nown = own_package\n")
    code = (
        "from mosaic_dist.model.norm import Norm; from mosaic_dist.spec import parse; "
        "print(parse(Norm, 'own_norm', ''))"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environment() | {"PYTHONPATH": paths},
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert found.stdout == "OwnNorm()\n", found.stderr
