"""`python -m mosaic_dist plan`: from words to a plan."""

from json import dumps
from pathlib import Path
from typing import Any, Literal

from mosaic_dist.errors import UserError
from mosaic_dist.hardware import find_device
from mosaic_dist.parallel import read_config
from mosaic_dist.plan.calibrate import calibrate as measure
from mosaic_dist.plan.picture import draw_memory
from mosaic_dist.plan.plan import make_plan
from mosaic_dist.plan.report import GIB, render_plan, render_search
from mosaic_dist.plan.search import search as try_layouts
from mosaic_dist.plan.sizes import run_in
from mosaic_dist.run_spec import Run
from mosaic_dist.spec import Positive, PositiveFloat, override


def plan(
    *recipe: str,
    nodes: Positive = 1,
    gpus_per_node: Positive = 8,
    gpu: str = "h100",
    ep: Positive | Literal["auto"] | None = None,
    sp: Positive | None = None,
    zero: Literal[0, 1, 2, 3] | None = None,
    ds_config: str | None = None,
    micro_batch_size: Positive | None = None,
    seq_len: Positive | None = None,
    checkpointing: Literal["none", "full", "attention", "ffn", "moe"] | None = None,
    tokens: Positive | None = None,
    node_memory: PositiveFloat | None = None,
    search: bool = False,
    best: Positive = 10,
    json: bool = False,
    plot: str | None = None,
    calibrate: str | None = None,
    **overrides: Any,
) -> None:
    """Predict memory, traffic and time of a run on a cluster, without any of it.

    `plan RECIPE`, a Python recipe or a run as YAML. Any field of the run is changed by its path, as at its start.

    --nodes N             nodes of the cluster
    --gpus_per_node N     ranks of each
    --gpu NAME            t4, a100, h100, h100_pcie, h200, b200, or a file that --calibrate wrote
    --ep N                expert-parallel ranks; the recipe's by default
    --sp N                ranks that share each sequence; the recipe's by default
    --zero N              ZeRO stage; 1 by default, or that of --ds_config FILE
    --micro_batch_size N       sequences at a time
    --seq_len N           tokens of a sequence
    --checkpointing PARTS what runs again in the backward pass: none, full, attention, ffn or moe
    --tokens N            for days and GPU-hours; the run's steps by default
    --node_memory GIB     of a node's host, to be checked as well; what an offload moves lies there
    --search              try the layouts, and list the --best N that fit
    --json                for programs
    --plot FILE           draw the memory as PNG
    --calibrate FILE      measure this machine instead, for --gpu FILE
    """
    if calibrate is not None:
        print(measure(Path(calibrate)).to_yaml(), end="")
        return
    if len(recipe) != 1:
        raise UserError("give one recipe, as `plan recipes/gptoss_20b.py`")
    if zero is not None and ds_config is not None:
        raise UserError("--zero and --ds_config both give a ZeRO stage; give one of them")
    given = {
        "parallel.expert_parallel": ep,
        "parallel.sequence_parallel": sp,
        "micro_batch_size": micro_batch_size,
        "data.seq_len": seq_len,
        "parallel.activation_checkpointing.parts": checkpointing,
    }
    run = override(
        load_recipe(recipe[0]), overrides | {path: value for path, value in given.items() if value is not None}
    )
    config = read_config(ds_config) if zero is None else {"zero_optimization": {"stage": zero}}
    device = find_device(gpu)
    if search:
        if json or plot is not None or node_memory is not None:
            raise UserError("--search prints a table; leave --json, --plot and --node_memory to a plan of one layout")
        print(render_search(*try_layouts(run, config, device, nodes, gpus_per_node, tokens), best))
        return
    node_memory_bytes = None if node_memory is None else node_memory * GIB
    made = make_plan(run, config, device, nodes, gpus_per_node, tokens, node_memory_bytes)
    print(dumps(made.to_dict(), indent=2) if json else render_plan(made))
    if plot is not None:
        draw_memory(made, Path(plot))


def load_recipe(recipe: str) -> Run:
    """The run of a Python recipe or of a YAML file. UserError where there is none."""
    path = Path(recipe)
    if not path.is_file():
        raise UserError(f"there is no recipe {recipe}")
    if path.suffix in (".yaml", ".yml"):
        return Run.from_yaml(path.read_text())
    run = run_in(path)
    if run is None:
        raise UserError(f"{recipe} is no recipe (a Python file with a `run`)")
    return run
