"""Tensors with every awkward size and dtype, and their cutting into intervals, shared by these tests."""

import itertools
import math
import random
from pathlib import Path

import torch
from torch import Tensor

from mosaic_dist.checkpoint import TensorShard, save

SHAPES: dict[str, tuple[int, ...]] = {
    "experts.up.weight": (4, 33, 17),
    "norm.weight": (97,),
    "scale": (),
    "nothing": (0, 5),
    "head/odd name": (41, 8),
}
DTYPES = {"master": torch.float32, "half": torch.bfloat16, "count": torch.int64}


def random_tensors(seed: int = 0) -> dict[tuple[str, str], Tensor]:
    """Values by (tensor, kind), random in every bit (so NaNs and infinities too)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (name, kind): torch.randint(
            0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator
        )
        .view(dtype)
        .view(shape)
        for name, shape in SHAPES.items()
        for kind, dtype in DTYPES.items()
    }


def cut(tensors: dict[tuple[str, str], Tensor], ranks: int, seed: int = 0) -> list[list[TensorShard]]:
    """Cut each tensor at random places (some twice: empty pieces) and deal the pieces to ranks in random order."""
    chance = random.Random(seed)
    dealt: list[list[TensorShard]] = [[] for _ in range(ranks)]
    for (name, kind), tensor in tensors.items():
        flat = tensor.reshape(-1)
        places = sorted([0, len(flat), *(chance.randint(0, len(flat)) for _ in range(5))])
        for low, high in itertools.pairwise(places):
            chance.choice(dealt).append(TensorShard(name, kind, low, flat[low:high]))
    for pieces in dealt:
        chance.shuffle(pieces)
    return dealt


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal shape, dtype and bytes; NaN equals NaN."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def save_small(root: Path, step: int, seed: int | None = None) -> Path:
    """A checkpoint of one process; its content follows from `seed`, by default the step."""
    (pieces,) = cut(random_tensors(step if seed is None else seed), 1)
    return save(root, step, pieces, SHAPES, {"step": step, "seed": seed}, {"generator": torch.arange(5) + step})
