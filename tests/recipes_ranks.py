"""Ranks of test_recipes: every recipe, made small, takes steps with expert parallelism and ZeRO-2."""

from typing import Any

import torch

from mosaic_dist.model import Transformer
from mosaic_dist.parallel import Engine, choose_degree, expert_counts, fill_config, join_world, leave_world
from mosaic_dist.plan.sizes import recipes_in

SMALL = {
    "vocab_size": 64, "dim": 32, "max_seq_len": 32, "rank": 8, "heads": 4, "head_dim": 8, "rope_head_dim": 4,
    "hidden_dim": 32, "kv_heads": 2, "sliding_window": 8,
    "kv_compression_dim": 8, "q_compression_dim": 8, "original_max_seq_len": 16,
}  # fmt: skip


def shrink(value: Any, key: str = "") -> Any:
    """A spec's dict with every size made small; the kinds of its parts, their number of experts and choices stay."""
    if isinstance(value, dict):
        small = {name: shrink(item, name) for name, item in value.items()}
        return small
    if key == "layers":
        return [shrink(block) for block in (*value[:1], *value[-1:])]
    return SMALL.get(key, value) if value is not None else None


def main() -> None:
    """Three steps on the same tokens each; the loss must be finite and fall."""
    world = join_world(60)
    tokens = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(0))
    mine = tokens[2 * world.rank : 2 * world.rank + 2]
    for name, run in recipes_in("recipes"):
        model = Transformer.from_dict(shrink(run.model.to_dict()))
        with torch.device("meta"):
            degree = choose_degree("auto", expert_counts(model.build()), world.size, world.size)
        config = fill_config(
            {"zero_optimization": {"stage": 2}}, precision="fp32", micro_batch_size=2, accumulation=1, world_size=2,
            max_grad_norm=1.0,
        )  # fmt: skip
        engine = Engine(model, run.optimizer, config, degree, 0, world)
        losses = [engine.train_step(mine[:, :-1], mine[:, 1:], 5e-3).loss for _ in range(3)]
        assert losses[2] < losses[1] < losses[0], (name, losses)
        if world.is_main:
            print("trained", name, degree, losses)
    leave_world()


if __name__ == "__main__":
    main()
