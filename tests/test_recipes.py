"""The ladder: every recipe trains on two ranks, and the README's table is what the command computes."""

from mosaic_dist.plan.sizes import recipes_in, size_table
from tests.launch import ROOT, check, run_ranks


def test_every_recipe_trains():
    output = check(run_ranks("tests.recipes_ranks", 2))
    assert output.count("trained ") == len(list(recipes_in(ROOT / "recipes"))) >= 12


def test_the_readme_has_the_table_that_the_command_prints():
    assert size_table(ROOT / "recipes") in (ROOT / "README.md").read_text()
