"""Ternary matrices in files as products see them: five values in a byte, and a scale per matrix.

NAME.packed   uint8 [ceil(n / 5)], see `pack_ternary`
NAME.scale    float32, [] or [experts]

in the place of each ternary NAME. Values and scales are those of the float32 masters, whatever the dtype of the other
tensors. They cannot be turned back into weights that round to them: the mean of |value * scale| is below the scale as
soon as one value is 0. So the layers of a model that is read from such a file are frozen: they take weights as is.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from mosaic_dist.errors import UserError
from mosaic_dist.model.ternary import (
    WEIGHTS_PER_BYTE,
    TernaryGroupedLinear,
    TernaryLinear,
    pack_ternary,
    ternary,
    transform_weight,
    unpack_ternary,
)

PACKED, SCALE = "packed", "scale"


class FrozenTernaryLinear(TernaryLinear):
    """`TernaryLinear` whose weight has been rounded: -scale, 0 and scale."""

    def transform_weight(self) -> Tensor:
        """As it is."""
        return self.weight


class FrozenTernaryGroupedLinear(TernaryGroupedLinear):
    """`TernaryGroupedLinear` whose weights have been rounded."""

    def transform_weight(self) -> Tensor:
        """As they are."""
        return self.weight


FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    TernaryLinear: FrozenTernaryLinear,
    TernaryGroupedLinear: FrozenTernaryGroupedLinear,
}


def ternary_weights(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every ternary weight; UserError if there is none."""
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in FROZEN}
    if not layers:
        raise UserError("the model has no ternary matrices to pack; leave --ternary out, or use matrix 'ternary'")
    return {f"{name}.weight": tuple(layer.weight.shape) for name, layer in layers.items()}


def freeze(model: nn.Module) -> None:
    """Let ternary layers take their weights as they are. Such weights are not for training."""
    for layer in model.modules():
        if type(layer) in FROZEN:
            layer.__class__ = FROZEN[type(layer)]  # the same parameters, names and settings; only `forward` differs
            layer.weight.requires_grad_(False)


def pack(
    tensors: Iterable[tuple[str, Tensor]], names: Iterable[str], cast: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Float tensors of a model -> tensors of a file: the named ones packed, the others cast."""
    names = set(names)
    for name, tensor in tensors:
        if name in names:
            values, scale = ternary(tensor.float())
            yield f"{name}.{PACKED}", pack_ternary(values)
            yield f"{name}.{SCALE}", scale
        else:
            yield name, cast(name, tensor)
        del tensor  # before the next one is read


def plan(
    tensors: Iterable[tuple[str, Tensor]], names: Iterable[str], cast: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """What `pack` gives, of tensors without data (on the meta device): names, shapes and dtypes."""
    names = set(names)
    for name, tensor in tensors:
        if name in names:
            size = math.ceil(tensor.numel() / WEIGHTS_PER_BYTE)
            yield f"{name}.{PACKED}", torch.empty(size, dtype=torch.uint8, device="meta")
            yield f"{name}.{SCALE}", torch.empty(tensor.shape[:-2], dtype=torch.float32, device="meta")
        else:
            yield name, cast(name, tensor)


def unpack(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file -> tensors of a frozen model, packed ones (with these `shapes`) in `dtype`.

    UserError for bytes and scales that no packing gives. One that has only half of its tensors is left out.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for stored, tensor in tensors:
        name, _, half = stored.rpartition(".")
        if stored in shapes:
            raise UserError(f"{stored} is not packed, though config.json says so")
        if name not in shapes:
            yield stored, tensor
            continue
        found = halves.setdefault(name, {})
        found[half] = tensor
        if found.keys() == {PACKED, SCALE}:
            yield name, _unpacked(name, found[PACKED], found[SCALE], shapes[name], dtype)
            del halves[name]


def _unpacked(name: str, packed: Tensor, scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if scale.shape != shape[:-2] or not bool((scale.isfinite() & (scale > 0)).all()):
        raise UserError(f"{name}.{SCALE} {list(scale.shape)} should be {list(shape[:-2])} of positive numbers")
    try:
        return transform_weight(unpack_ternary(packed, shape), scale, dtype)
    except ValueError as error:
        raise UserError(f"{name}.{PACKED}: {error}") from None
