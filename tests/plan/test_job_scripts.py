"""The job scripts ask for the nodes that their recipes fit on."""

import re

import pytest

from mosaic_dist.hardware import find_device
from mosaic_dist.parallel import read_config
from mosaic_dist.plan.command import load_recipe
from mosaic_dist.plan.plan import Plan, make_plan
from tests.launch import ROOT

BESIDE_BYTES = 4 << 30
"""Of a device, for the CUDA context, NCCL and fragmentation."""
SCRIPTS = ("gptoss_20b", "gptoss_120b", "mosaic_small")


def plan_of(script: str) -> Plan:
    """The plan of what a script starts by default, on H100s."""
    text = (ROOT / "slurm" / f"{script}.sh").read_text()
    asked = {name: int(found) for name, found in re.findall(r"^#SBATCH --([a-z-]+)=(\d+)$", text, re.MULTILINE)}
    started = dict(re.findall(r"(RECIPE|DS_CONFIG)=\$\{\w+:-(\S+)\}", text))
    run, config = load_recipe(str(ROOT / started["RECIPE"])), read_config(ROOT / started["DS_CONFIG"])
    return make_plan(run, config, find_device("h100"), asked["nodes"], asked["gpus-per-node"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_recipes_fit_the_nodes_that_their_scripts_ask_for(script):
    plan = plan_of(script)
    assert plan.memory.peak_bytes + BESIDE_BYTES < plan.device.memory_bytes


def test_the_largest_does_not_fit_on_half_of_its_nodes_when_weights_are_whole():
    """So the check above can fail."""
    run = load_recipe(str(ROOT / "recipes/gptoss_120b.py"))
    assert not make_plan(run, {"zero_optimization": {"stage": 1}}, find_device("h100"), 8, 8).fits
