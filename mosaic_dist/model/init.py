"""Initial weights, drawn by parameter name.

Every matrix has a random stream of its own, seeded by (seed, name), and every expert by (seed, name, index in the
model). So a weight does not depend on which other weights are held here, on the order they are made in, or on the
device: any split of the model over processes starts from the same numbers.
"""

import math
from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor, nn

from mosaic_dist.model.linear import GroupedLinear
from mosaic_dist.spec import PositiveFloat, Spec


class Init(Spec, type="gpt2"):
    """Normal with deviation `std`, divided by sqrt(2 * layers) where a layer writes into the residual stream.

    GPT-2 (Radford et al. 2019, section 2.3). Gains start at one, biases at zero. Projections between a factored table
    and the model keep the scale of what passes them: with `std` on both factors, tokens would start 1/20 as large as
    positions and stay unread for a long time. A module that names a `deviation` of its own, or constants by parameter
    name as its `starts`, gets these.
    """

    std: PositiveFloat = 0.02
    scale_residual: bool = True


@torch.no_grad()
def initialize(model: nn.Module, init: Init, layers: int, seed: int, starts: Mapping[str, float] | None = None) -> None:
    """Fill every parameter of a model in place; `starts` are factors on deviations and constants, by parameter."""
    done, starts = set(), starts or {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in done:  # a tied table is met twice
                done.add(parameter)
                full_name, std = f"{module_name}.{name}", _deviation(module, init, layers)
                _fill(module, parameter, name, full_name, std, starts.get(full_name, 1.0), seed)


def _deviation(module: nn.Module, init: Init, layers: int) -> float:
    own: float | None = getattr(module, "deviation", None)
    if own is not None:
        return own
    residual = getattr(module, "residual", False) and init.scale_residual
    return init.std / math.sqrt(2 * layers) if residual else init.std


def _fill(
    module: nn.Module, parameter: Tensor, name: str, full_name: str, std: float, factor: float, seed: int
) -> None:
    constants: dict[str, float] = getattr(module, "starts", {})
    if name == "bias":
        parameter.zero_()
    elif name in constants:
        parameter.fill_(constants[name] * factor)
    elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
        parameter.fill_(factor)
    elif isinstance(module, GroupedLinear):
        for i in range(parameter.shape[0]):
            parameter[i] = _normal(parameter[i], std * factor, f"{seed}/{full_name}/{module.first_expert + i}")
    else:
        parameter.copy_(_normal(parameter, std * factor, f"{seed}/{full_name}"))


def _normal(like: Tensor, std: float, stream: str) -> Tensor:
    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(stream.encode()) >> 1)
    return torch.empty(like.shape).normal_(0.0, std, generator=generator).to(like.device, like.dtype)


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give a model that was built on the meta device uninitialised storage; parameters that are shared stay shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device))
                made[parameter].__dict__.update(parameter.__dict__)
            setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):  # made on the CPU, with their values
            module._buffers[name] = buffer.to(device)
