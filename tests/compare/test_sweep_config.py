"""Which runs a sweep means, with which words, and what is refused before any of them starts."""

from pathlib import Path

import pytest

from mosaic_dist.cli import parse_words
from mosaic_dist.compare.history import read_spec
from mosaic_dist.compare.sweep import sweep
from mosaic_dist.compare.sweep_config import SweepConfig, plan_runs, with_flags, written
from mosaic_dist.errors import UserError
from mosaic_dist.model import count_parameters
from mosaic_dist.plan.command import load_recipe
from mosaic_dist.spec import override
from recipes.sweeps.small import run as small
from tests.launch import ROOT

SHEETS = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))
SHEET = """
recipe: recipes/sweeps/small.py
flags: {steps: 7, schedule.warmup_steps: 0, data: d}
variants:
  plain: {}
  gelu: {model.layers.ffn: {type: gelu, hidden_dim: 64}, steps: 9}
grid:
  optimizer.learning_rate: [1e-3, 0.5]
seeds: [0, 3]
"""


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def sheet(folder: Path, text: str) -> Path:
    path = folder / "sheet.yaml"
    path.write_text(text)
    return path


def planned(folder: Path, text: str, **more):
    return plan_runs(read_spec(SweepConfig, sheet(folder, text)), more, folder / "out")


def test_every_variant_with_every_value_and_seed(tmp_path):
    runs = {one.name: one.run for one in planned(tmp_path, SHEET, batch_tokens=4096)}
    rates = {"0.001": 1e-3, "0.5": 0.5}
    assert set(runs) == {
        f"{variant}_learning_rate_{rate}_seed{seed}"
        for variant in ("plain", "gelu")
        for rate in rates
        for seed in (0, 3)
    }
    expected = override(
        small,
        {"name": "gelu_learning_rate_0.5_seed3", "seed": 3, "steps": 9, "schedule.warmup_steps": 0, "data.path": "d",
         "batch_tokens": 4096, "optimizer.learning_rate": 0.5, "model.layers.ffn": {"type": "gelu", "hidden_dim": 64}},
    )  # fmt: skip
    assert runs["gelu_learning_rate_0.5_seed3"] == expected


def test_the_words_make_the_run_that_was_planned(tmp_path):
    """What a process makes of its command line is what was checked."""
    for path in SHEETS:
        for one in plan_runs(read_spec(SweepConfig, path), {"data": "it's=0.5,b=0.5", "expert_parallel": 1}, tmp_path):
            script, *words = one.command
            _, flags = parse_words(words)
            assert Path(flags.pop("output")) == tmp_path / one.name
            assert with_flags(load_recipe(script), flags) == one.run


@pytest.mark.parametrize(
    "value",
    [
        True, None, 3, -1.5, 1e-7, "", "a b", "work/data", "3", "None", "True", "it's", "{a: 1}", "[1", "1e-3",
        "a=b", "-x", [], [1, "two", None],
        {"type": "moe", "expert": {"type": "swiglu", "hidden_dim": 8}, "z": [False, "if", "a-b"]},
    ],
)  # fmt: skip
def test_a_value_passes_the_command_line(value):
    _, flags = parse_words([f"--field={written(value)}"])
    assert flags["field"].meant_for(str if isinstance(value, str) else float | bool | None) == value


def test_yaml_runs(tmp_path):
    (tmp_path / "run.yaml").write_text(small.to_yaml())
    (one,) = planned(tmp_path, f"recipe: {tmp_path}/run.yaml\n")
    assert one.command[:2] == ["recipes/train.py", f"--config={tmp_path}/run.yaml"]
    assert one.run == override(small, {"name": "small_seed0"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("hidden_dim: 64", "hiden_dim: 64"), "_0.001_seed0: model.layers[0].ffn.hiden_dim: gelu has no such field"),
        (("0.5]", "-1]"), "run plain_learning_rate_-1_seed0: optimizer.learning_rate: -1.0 must be at least"),
        (("steps: 9", "step: 9"), "run gelu_learning_rate_0.001_seed0: step: Run has no such field; did you mean"),
        (("hidden_dim: 64", "hidden_dim: 64, linear: {type: unit, scaled: 3}"), "expected bool"),
        (("seeds: [0, 3]", "seeds: []"), "sheet.yaml: seeds: the list is empty"),
        (("[1e-3, 0.5]", "[]"), "grid.optimizer.learning_rate: the list is empty"),
        (("plain: {}", "plain: {seed: 4}"), "variants.plain: seed is what the sweep sets"),
        (("steps: 7", "output: x"), "flags: output is what the sweep sets"),
        (("plain:", "../x:"), "'../x' is to name folders"),
        (("small.py", "none.py"), "there is no recipe recipes/sweeps/none.py"),
        (("flags:", "flagz:"), "flagz"),
        (("plain: {}", "plain: {}\n  plain: {}"), "a key stands twice"),
        (("[1e-3, 0.5]", "[1e-3, 0.001]"), "two runs of the sweep are called plain_learning_rate_0.001_seed0"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, change, says):
    with pytest.raises(UserError) as caught:
        planned(tmp_path, SHEET.replace(*change))
    assert says in str(caught.value)


def test_what_the_model_and_the_data_refuse_is_told_before_a_run_starts(tmp_path):
    """The last run is wrong: nothing is there afterwards."""
    path = sheet(
        tmp_path, SHEET.replace("hidden_dim: 64", "hidden_dim: 64}, model.layers.attention: {type: mha, heads: 3")
    )
    with pytest.raises(
        UserError, match=r"run gelu_learning_rate_0.001_seed0: model.layers\[0\].attention.heads: 3 heads"
    ):
        sweep(str(path), output=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"run plain_learning_rate_0.001_seed0: .*nowhere"):
        sweep(str(sheet(tmp_path, SHEET)), output=str(tmp_path / "out"), data=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"run plain.*none\.json"):
        sweep(str(sheet(tmp_path, SHEET)), output=str(tmp_path / "out"), ds_config="none.json")
    with pytest.raises(UserError, match="--seed is what the sweep sets"):
        sweep(str(sheet(tmp_path, SHEET)), seed=4)
    with pytest.raises(UserError, match="give one sweep"):
        sweep()
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_run_is_refused(tmp_path):
    one = planned(tmp_path, SHEET)[3]
    one.folder.mkdir(parents=True)
    (one.folder / "run.yaml").write_text(one.run.to_yaml())
    planned(tmp_path, SHEET)
    with pytest.raises(UserError, match=r"plain_learning_rate_0\.5_seed3 holds another run; choose another --output"):
        planned(tmp_path, SHEET, batch_tokens=512)


@pytest.mark.parametrize("path", SHEETS, ids=lambda path: path.stem)
def test_the_sweeps_that_come_along(path, tmp_path, capsys):
    sweep(str(path), output=str(tmp_path), dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(plan_runs(read_spec(SweepConfig, path), {}, tmp_path))
    assert all("parameters" in line for line in lines[::2])
    assert all(line.startswith("  deepspeed ") for line in lines[1::2])
    assert list(tmp_path.iterdir()) == []


def active(name: str) -> dict[str, int]:
    """Active parameters by variant, of the first seed."""
    runs = plan_runs(read_spec(SweepConfig, ROOT / "recipes" / "sweeps" / f"{name}.yaml"), {}, Path("none"))
    return {one.name.removesuffix("_seed0"): count_parameters(one.run.model).active for one in runs if not one.run.seed}


def test_sizes_are_equal_where_the_sweeps_say_so():
    sizes, router = active("moe_dense"), 4 * 8 * 128
    assert sizes["moe"] - router == sizes["dense"]
    sizes = active("experts")
    routers = {"plain": 8, "shared": 7, "fine": 32, "fine_shared": 30}
    assert len({sizes[name] - 4 * 128 * experts for name, experts in routers.items()}) == 1
    sizes = active("ngpt")
    assert abs(sizes["ngpt"] / sizes["untied"] - 1) < 0.01
    assert len({size for name, size in active("position").items() if name != "learned"}) == 1
