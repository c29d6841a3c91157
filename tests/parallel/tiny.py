"""A tiny model with experts, its data, and the plain PyTorch loop that every engine must equal."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from mosaic_dist.model import MHA, Block, Factored, MoE, SwiGLU, Transformer
from mosaic_dist.optim import AdamW
from mosaic_dist.parallel import Engine, World, fill_config

STEPS, BATCH, MICRO, LENGTH = 10, 8, 2, 24
LEARNING_RATE = 3e-3
OPTIMIZER = AdamW(learning_rate=LEARNING_RATE, max_grad_norm=0.3, weight_decay=0.1)
MODEL = Transformer(
    vocab_size=64,
    dim=32,
    max_seq_len=LENGTH,
    embedding=Factored(rank=16),
    layers=(
        Block(attention=MHA(heads=4), ffn=SwiGLU(hidden_dim=48)),
        Block(attention=MHA(heads=4), ffn=MoE(expert=SwiGLU(hidden_dim=64), split=4, experts=4, top_k=2)),
    ),
)


def make_engine(
    world: World,
    stage: int,
    degree: int,
    model: Transformer = MODEL,
    fill: Callable[[nn.Module], None] | None = None,
) -> Engine:
    """The engine of this rank for a ZeRO stage and an expert-parallel degree; `fill` gives it other weights."""
    config = fill_config(
        {"zero_optimization": {"stage": stage}},
        precision="fp32",
        micro_batch_size=MICRO,
        accumulation=BATCH // MICRO // world.size,
        world_size=world.size,
        max_grad_norm=OPTIMIZER.max_grad_norm,
    )
    return Engine(model, OPTIMIZER, config, degree, 0, world, fill)


def my_part(world: World) -> slice:
    """Rows of the global batch that this rank trains on."""
    return slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Per step inputs and targets [BATCH, LENGTH] of the global batch."""
    generator = torch.Generator().manual_seed(1)
    walk = torch.randint(0, 7, (STEPS, BATCH, LENGTH + 1), generator=generator).cumsum(-1) % MODEL.vocab_size
    return [(step[:, :-1].contiguous(), step[:, 1:].contiguous()) for step in walk]


def reference(left_out: Collection[int] = ()) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and final weights of one process without DeepSpeed; steps can be left out."""
    model = MODEL.build_initialized(0)
    optimizer = OPTIMIZER.build(OPTIMIZER.groups(model))
    losses, norms = [], []
    for step, (inputs, targets) in enumerate(batches()):
        if step in left_out:
            continue
        total = 0.0
        for x, y in zip(inputs.split(MICRO), targets.split(MICRO), strict=True):
            parts = model(x, y)
            (parts.cross_entropy_sum / targets.numel() + parts.auxiliary / (BATCH // MICRO)).backward()
            total += parts.cross_entropy_sum.item()
        losses.append(total / targets.numel())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}
