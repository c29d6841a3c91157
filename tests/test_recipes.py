"""The ladder: every recipe trains on two ranks, and the README's table is what the command computes."""

import runpy
import sys

from mosaic_dist.plan.sizes import recipes_in, size_table
from tests.launch import ROOT, check, run_ranks


def test_every_recipe_trains():
    output = check(run_ranks("tests.recipes_ranks", 2))
    assert output.count("trained ") == len(list(recipes_in(ROOT / "recipes"))) >= 12


def test_the_readme_has_the_table_that_the_command_prints():
    assert size_table(ROOT / "recipes") in (ROOT / "README.md").read_text()


def test_the_same_run_as_yaml_is_resolved_alike(tmp_path, monkeypatch, capsys):
    def printed(recipe: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [recipe, *words, "--dry_run"])
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
        return capsys.readouterr().out

    for name, run in recipes_in(ROOT / "recipes"):
        written = tmp_path / f"{name}.yaml"
        written.write_text(run.to_yaml())
        said = printed(name)
        assert f"name: {name}\n" in said
        assert printed("train", "--config", str(written)) == said
