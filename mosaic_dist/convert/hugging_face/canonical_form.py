"""When two specs are the same function: the form in which models are compared and written in Hugging Face's words."""

import dataclasses
import math
from typing import Any, TypeVar

from mosaic_dist.errors import UserError
from mosaic_dist.model import (
    FFN,
    GQA,
    MLA,
    Attention,
    Init,
    Loss,
    MoE,
    MoESwiGLU,
    SoftmaxTopK,
    TopKSoftmax,
    Transformer,
)
from mosaic_dist.model.attention import SoftmaxAttention
from mosaic_dist.model.norm import epsilon
from mosaic_dist.spec import Spec, fields, join

S = TypeVar("S", bound=Spec)


class Misfit(UserError):
    """Why a model is not of an architecture."""


def need(value: Spec, kind: type[S], path: str) -> S:
    """The value, which is of this kind; `Misfit` if not."""
    if not isinstance(value, kind):
        raise Misfit(f"{path} is {value.type_name!r}, not {kind.type_name or kind.__name__!r}")
    return value


def canonical_form(spec: Transformer) -> Transformer:
    """The spec with defaults written out, like things in one form, and without what plays no part in the logits.

    Left out are dropout, initial values, kernels, the form of the loss and balance losses: they are the training's.
    """
    blocks = tuple(
        dataclasses.replace(  # the block keeps its kind, and what else it has: twins are compared with all of it
            block, attention=_canonical_attention(block.attention, spec), ffn=_canonical_ffn(block.ffn), dropout=0.0
        )
        for block in spec.layers
    )
    return dataclasses.replace(spec, layers=blocks, init=Init(), loss=Loss())


def _canonical_attention(attention: Attention, spec: Transformer) -> Attention:
    if isinstance(attention, MLA):
        head_dim = attention.head_dim or spec.dim // attention.heads
        v_head_dim = attention.v_head_dim or head_dim
        return dataclasses.replace(attention, head_dim=head_dim, v_head_dim=v_head_dim, dropout=0.0, kernel="sdpa")
    if not isinstance(attention, SoftmaxAttention):
        return attention
    plain = {name: getattr(attention, name) for name in fields(SoftmaxAttention)}
    plain["head_dim"] = attention.head_dim or spec.dim // attention.heads
    plain["output_bias"] = attention.bias if attention.output_bias is None else attention.output_bias
    plain["dropout"] = 0.0
    plain["kernel"] = "sdpa" if attention.logit_softcap is None else "explicit"
    if not attention.qk_norm:
        del plain["qk_norm_eps"]
    elif attention.qk_norm_eps is None:
        plain["qk_norm_eps"] = epsilon(spec.norm)
    return GQA(kv_heads=attention.key_value_heads(), **plain)


def _canonical_ffn(ffn: FFN) -> FFN:
    if isinstance(ffn, MoESwiGLU):
        ffn = ffn.written_out()
    if not isinstance(ffn, MoE):
        return ffn
    expert = dataclasses.replace(ffn.expert, hidden_dim=ffn.expert.hidden_dim // ffn.split)
    router = SoftmaxTopK(normalize=True) if isinstance(ffn.router, TopKSoftmax) else ffn.router
    return dataclasses.replace(ffn, expert=expert, split=1, router=router, aux_loss_coef=0.0)


def first_difference(here: Any, there: Any, path: str = "") -> str | None:
    """The first place where two specs in plain form (`to_dict`) differ, in words; floats may differ by rounding."""
    if isinstance(here, dict) and isinstance(there, dict):
        for key in {**here, **there}:
            if found := first_difference(here.get(key), there.get(key), join(path, key)):
                return found
        return None
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        for i, pair in enumerate(zip(here, there, strict=True)):
            if found := first_difference(*pair, f"{path}[{i}]"):
                return found
        return None
    if isinstance(here, float) and isinstance(there, float) and math.isclose(here, there, rel_tol=1e-9):
        return None
    return None if here == there else f"{path} is {here!r}, and would be {there!r}"


def moe_layers(spec: Transformer) -> list[MoE]:
    """The mixtures of experts among the (canonical) blocks; `Misfit` if there are none."""
    found = [block.ffn for block in spec.layers if isinstance(block.ffn, MoE)]
    if not found:
        raise Misfit("no block has a mixture of experts")
    return found
