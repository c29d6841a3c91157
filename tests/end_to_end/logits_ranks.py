"""Ranks of test_export: load a run's checkpoint into an engine and save the logits that the trained model gives."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mosaic_dist.checkpoint import newest
from mosaic_dist.checkpoint.engine_state import load_engine
from mosaic_dist.parallel import Engine, fill_config, join_world, leave_world
from mosaic_dist.run_spec import Run


def main(folder: str, output: str) -> None:
    """Every rank gives the logits of the same tokens; rank 0 writes them."""
    world = join_world(60)
    run = Run.from_yaml((Path(folder) / "run.yaml").read_text())
    config = fill_config(
        {"zero_optimization": {"stage": 2}},
        precision="fp32",
        micro_batch_size=2,
        accumulation=1,
        world_size=world.size,
        max_grad_norm=1.0,
    )
    engine = Engine(run.model, run.optimizer, config, 2, 1234, world)  # another seed: the weights must be loaded
    load_engine(newest(Path(folder) / "checkpoints"), engine)
    tokens = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = engine.model.eval()(tokens)
    if world.is_main:
        save_file({"tokens": tokens, "logits": logits.contiguous()}, output)
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
