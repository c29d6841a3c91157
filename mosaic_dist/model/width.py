"""Maximal update parametrization (muP): what was tuned on a narrow model holds for a wide one.

Yang et al., Tensor Programs V, arXiv 2203.03466. For each parameter of a model it follows from its shape and that in a
narrower base model how small it starts and how slowly it learns, so that in every layer activations, and what a step
changes of them, keep their size however wide the layers are. At the base's own widths nothing changes.

The paper also multiplies logits by 1 / width and scores by 1 / head width. Under Adam and Muon a factor on what a
matrix or gain gives is the same as starting it smaller and learning it slower by this factor (Lemma J.1), so here the
final norm's gain and the queries carry these: the forward pass stays as it is, and with it exports and generation.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from mosaic_dist.model.attention.mla import LatentAttention
from mosaic_dist.model.attention.softmax import MultiHeadAttention
from mosaic_dist.model.head import HeadModule, UnitLinearHead
from mosaic_dist.model.init import Init
from mosaic_dist.model.linear import GroupedLinear
from mosaic_dist.model.norm import UnitNormModule
from mosaic_dist.model.unit import Scale, UnitGroupedLinear, UnitLinear
from mosaic_dist.spec import Positive, SpecError


class MuP(Init, type="mup"):
    """Starts and learning rates for the widths of the model, from `std` and a learning rate tuned on a narrower one.

    `base` are the widths of that model by their paths in this one: {dim: 128, layers.ffn.hidden_dim: 384}. What grows
    with the width (heads or their width, latents, the experts' width) is named there too; everything else is the same
    in both: depth, vocabulary, number of experts. Learning rate, warm-up, betas, clipping and weight decay carry over,
    the last as learning_rate * weight_decay, which is then the same for all parameters (independent decay).
    """

    base: dict[str, Positive]

    def __hash__(self) -> int:
        """Of all values, like other specs', although a dict has none."""
        return hash((self.std, self.scale_residual, *sorted(self.base.items())))


class Factors(NamedTuple):
    """What one parameter does differently from its like in the base model."""

    start: float
    """On its initial deviation, or constant."""
    rate: float
    """On its learning rate under Adam."""
    muon_rate: float
    """On its learning rate where Muon updates it."""


class Place(NamedTuple):
    """A parameter in its module."""

    module: nn.Module
    key: str
    parameter: nn.Parameter

    @property
    def deviation(self) -> float | None:
        """The initial deviation that the module asks for itself."""
        return getattr(self.module, "deviation", None)

    def widths(self) -> tuple[int, int, tuple[int, ...]]:
        """Inputs and outputs, 1 where they do not grow with the model, and the dimensions that are no widths."""
        shape = tuple(self.parameter.shape)
        if isinstance(self.module, GroupedLinear):  # [experts, inputs, outputs], or biases [experts, outputs]
            return (shape[1] if len(shape) == 3 else 1), shape[-1], shape[:1]
        if len(shape) == 1:
            return 1, shape[0], ()
        if getattr(self.module, "is_table", False) or isinstance(self.module, HeadModule):
            return 1, shape[1], shape[:1]  # what a head reads has become smaller before it, see `_carriers`
        return shape[1], shape[0], ()


OF_LENGTH_ONE = (Scale, UnitLinear, UnitGroupedLinear, UnitLinearHead, UnitNormModule)
"""What makes vectors of length one, which is all that nGPT consists of."""


def width_factors(model: nn.Module, base: nn.Module) -> dict[str, Factors]:
    """The factors of every parameter of a model, by name, from a base model of other widths; both may be on meta.

    SpecError for models that differ in more than widths, and for unit vectors, whose lengths are not free.
    """
    ours, theirs = dict(_places(model)), dict(_places(base))
    if differing := sorted(ours.keys() ^ theirs.keys()):
        raise SpecError("init.base", f"only widths may differ from the base; {differing[0]} is in one of them only")
    found = {}
    for name, place in ours.items():
        if place.widths()[2] != theirs[name].widths()[2]:
            shapes = f"{list(place.parameter.shape)}, and {list(theirs[name].parameter.shape)} there"
            raise SpecError("init.base", f"only widths may differ from the base; {name} is {shapes}")
        found[name] = _factors(place, theirs[name])
    for name, factor in _carriers(model, base):
        if name in found:
            found[name] = Factors(*(value * factor for value in found[name]))
    return found


def _places(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Every parameter by its first name."""
    seen = set()
    for module_name, module in model.named_modules():
        if isinstance(module, OF_LENGTH_ONE):
            raise SpecError(
                "init",
                f"'mup' with vectors of length one ({module_name}): how they start and turn does not follow its rules; "
                "use init 'gpt2', or no parts of nGPT",
            )
        for key, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield f"{module_name}.{key}", Place(module, key, parameter)


def _factors(here: Place, there: Place) -> Factors:
    """What gives a matrix and its updates spectral norms of sqrt(outputs / inputs) (Yang et al., arXiv 2310.17813).

    A random matrix of deviation s has about s * (sqrt(inputs) + sqrt(outputs)), Adam's update with learning rate r
    about r * sqrt(inputs * outputs), and Muon's is scaled to r * sqrt(longer side).
    """
    (inputs, outputs, _), (base_inputs, base_outputs, _) = here.widths(), there.widths()
    more_in, more_out = inputs / base_inputs, outputs / base_outputs
    longer = max(inputs, outputs) / max(base_inputs, base_outputs)
    start = math.sqrt(min(1.0, more_out / more_in) / more_in)
    if here.deviation is not None and there.deviation is not None:
        start *= there.deviation / here.deviation  # it is the base's that the factor is for
    return Factors(start, 1 / more_in, math.sqrt(more_out / more_in / longer))


def _carriers(model: nn.Module, base: nn.Module) -> Iterator[tuple[str, float]]:
    """Which parameters, by name where they exist, carry the factors on logits and scores."""
    for place, module in model.named_modules():
        like = base.get_submodule(place)
        if isinstance(module, HeadModule) and isinstance(like, HeadModule):
            feeding = "norm" if getattr(module, "down", None) is None else f"{place}.down"
            factor = like.weight.shape[1] / module.weight.shape[1]
        elif isinstance(module, MultiHeadAttention) and isinstance(like, MultiHeadAttention):
            feeding = f"{place}.query_norm" if module.spec.qk_norm else f"{place}.query"
            factor = math.sqrt(like.head_dim / module.head_dim)
        elif isinstance(module, LatentAttention) and isinstance(like, LatentAttention):
            feeding = f"{place}.query"
            factor = math.sqrt((like.head_dim + like.rope_head_dim) / (module.head_dim + module.rope_head_dim))
        else:
            continue
        yield from ((f"{feeding}.{key}", factor) for key in ("weight", "bias"))
