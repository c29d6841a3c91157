"""Bytes that expert parallelism sends per token and layer, counted at the calls and computed by the formula.

`torchrun --nproc_per_node 4 -m benchmarks.exchange` lets 4 CPU ranks share the experts over gloo, sends tokens through
one mixture forward and backward, and adds up what each rank hands to `all_to_all_single`. What a rank sends to itself
is counted too; with even routing 1 / ranks of it stays.
"""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from mosaic_dist.model import Init, MoE, SwiGLU, initialize, materialize
from mosaic_dist.parallel import World, join_world, leave_world, place_experts

TOKENS = 64
SHAPES = {  # width, experts, experts per token
    "mosaic_small": (768, 8, 2),
    "nano_moe": (768, 32, 6),
    "gptoss_20b": (2048, 8, 2),
    "openai_gptoss_20b": (2880, 32, 4),
}


def formula(dim: int, experts: int, top_k: int, itemsize: int) -> float:
    """Bytes per token and layer: rows with their weight there and results back, in both passes; and the counts."""
    return 2 * top_k * (2 * dim + 1) * itemsize + experts * 8 / TOKENS


def count(world: World, dim: int, experts: int, top_k: int, dtype: torch.dtype) -> float:
    """Bytes per token that this rank hands over in a forward and backward pass."""
    with torch.device("meta"):
        layer: Any = MoE(expert=SwiGLU(hidden_dim=32), experts=experts, top_k=top_k).build(dim)
    place_experts(layer, world.size, world.rank)
    materialize(layer, torch.device("cpu"))
    initialize(layer, Init(), 1, 0)
    layer.dispatcher.set_deepspeed_parallelism()
    layer.to(dtype)
    sent: list[int] = []
    original = dist.all_to_all_single

    def counted(out: Tensor, rows: Tensor, *words: Any, **named: Any) -> Any:
        sent.append(rows.nbytes)
        return original(out, rows, *words, **named)

    dist.all_to_all_single = counted
    layer(torch.randn(1, TOKENS, dim, dtype=dtype, requires_grad=True))[0].sum().backward()
    dist.all_to_all_single = original
    return sum(sent) / TOKENS


def main() -> None:
    """Print the table of this number of ranks as Markdown."""
    world = join_world(60)
    deepspeed.init_distributed(dist_init_required=False)
    rows = ["| layer of | ranks | dtype | counted | formula |", "|---|---:|---|---:|---:|"]
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            total = torch.tensor(count(world, *shape, dtype))
            dist.all_reduce(total)
            counted, expected = total.item() / world.size, formula(*shape, dtype.itemsize)
            kind = str(dtype).removeprefix("torch.")
            rows.append(f"| {name} | {world.size} | {kind} | {counted:,.0f} | {expected:,.0f} |")
    if world.is_main:
        print("\n".join(rows))
    leave_world()


if __name__ == "__main__":
    main()
