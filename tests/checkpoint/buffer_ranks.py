"""Ranks of test_buffers: a router's correction goes through a checkpoint into an engine made anew."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.checkpoint.engine_state import load_engine, save_engine
from mosaic_dist.model import SigmoidTopK
from mosaic_dist.parallel import Engine, fill_config, join_world, leave_world
from tests.parallel.tiny import MODEL, OPTIMIZER


def main(folder: str) -> None:
    """Save with a correction that no fresh model has, load, compare."""
    world = join_world(60)
    dense, sparse = MODEL.blocks
    model = replace(MODEL, blocks=(dense, replace(sparse, ffn=replace(sparse.ffn, router=SigmoidTopK()))))
    config = fill_config(
        {"zero_optimization": {"stage": 2}},
        precision="fp32",
        micro_batch=2,
        accumulation=1,
        world_size=2,
        clip_norm=1.0,
    )
    engine, fresh = (Engine(model, OPTIMIZER, config, 2, seed, world) for seed in (0, 1))
    correction = torch.tensor([0.5, -0.25, 0.125, 3.0])
    engine.model.blocks[1].ffn.router.correction.copy_(correction)
    saved = save_engine(Path(folder), 1, engine, {})
    load_engine(Checkpoint.open(saved), fresh)
    assert torch.equal(fresh.model.blocks[1].ffn.router.correction, correction)
    for one, other in zip(engine.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(one, other)
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
