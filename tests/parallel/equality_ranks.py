"""Ranks of test_equality: train the tiny model under every ZeRO stage and expert-parallel degree, save the result."""

import itertools
import sys

import torch
from safetensors.torch import save_file

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.checkpoint.engine_state import save_engine
from mosaic_dist.parallel import join_world, leave_world
from tests.parallel.tiny import LEARNING_RATE, batches, make_engine, my_part


def main(folder: str) -> None:
    """Write `<folder>/w<ranks>_z<stage>_e<degree>.safetensors` with losses, norms and all final weights."""
    from pathlib import Path

    world = join_world(60)
    degrees = [degree for degree in (1, 2) if world.size % degree == 0]
    for stage, degree in itertools.product((0, 1, 2, 3), degrees):
        engine = make_engine(world, stage, degree)
        held = sum(p.numel() for name, p in engine.model.named_parameters() if ".experts." in name and stage < 3)
        results = []
        for inputs, targets in batches():
            mine = my_part(world)
            result = engine.train_step(inputs[mine], targets[mine], LEARNING_RATE)
            results.append([result.loss, result.grad_norm, result.expert_load.sum().item()])
        path = Path(folder) / f"w{world.size}_z{stage}_e{degree}"
        saved = save_engine(path, 1, engine, {})
        if world.is_main:
            checkpoint = Checkpoint.open(saved)
            weights = {name: checkpoint.read_full(name, "master") for name in checkpoint.shapes}
            facts = {"results": torch.tensor(results, dtype=torch.float64), "held": torch.tensor(held)}
            save_file(weights | facts, path.with_suffix(".safetensors"))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
