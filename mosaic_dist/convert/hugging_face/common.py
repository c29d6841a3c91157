"""What the architectures that descend from Llama share: sizes, rotary positions, attention and SwiGLU."""

import math
from collections.abc import Iterator
from typing import Any

from mosaic_dist.convert.hugging_face.canonical_form import Misfit, need
from mosaic_dist.convert.hugging_face.rules import STACKED, Rule, same
from mosaic_dist.convert.hugging_face.settings import Known, Settings
from mosaic_dist.errors import UserError
from mosaic_dist.model import (
    GQA,
    LinearScaling,
    Llama3Scaling,
    Position,
    RMSNorm,
    RoPE,
    SwiGLU,
    Tied,
    Transformer,
    Untied,
    YaRN,
)
from mosaic_dist.model.position.rope import Scaling

DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "head_dim": None,  # hidden_size / num_attention_heads
    "num_key_value_heads": None,  # num_attention_heads
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
}
"""What absent keys stand for in most of these architectures; each adds its own sizes and what differs."""


def read_frame(settings: Settings) -> dict[str, Any]:
    """Fields of `Transformer` around the blocks, without the position."""
    settings.expect("hidden_act", "silu", "swish")
    return {
        "vocab_size": settings.take("vocab_size"),
        "dim": settings.take("hidden_size"),
        "max_seq_len": settings.take("max_position_embeddings"),
        "norm": RMSNorm(eps=settings.take("rms_norm_eps")),
        "head": Tied() if settings.take("tie_word_embeddings") else Untied(),
    }


def write_frame(spec: Transformer) -> dict[str, Any]:
    """The inverse."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "max_position_embeddings": spec.max_seq_len,
        "num_hidden_layers": len(spec.layers),
        "rms_norm_eps": need(spec.norm, RMSNorm, "norm").eps,
        "tie_word_embeddings": isinstance(spec.head, Tied),
        "hidden_act": "silu",
    }


def read_attention(settings: Settings, **more: Any) -> GQA:
    """Heads of the usual names. `more` are further fields."""
    heads = settings.count("num_attention_heads")
    width = settings.take("head_dim") or settings.count("hidden_size") // heads
    return GQA(heads=heads, kv_heads=settings.take("num_key_value_heads") or heads, head_dim=width, **more)


def write_attention(attention: GQA) -> dict[str, Any]:
    """The inverse."""
    return {
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
    }


# --- rotary positions ---------------------------------------------------------------------------------------------


ROPE = Known(
    {
        "original_max_position_embeddings": None,  # max_position_embeddings
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
        "attention_factor": None,
        "mscale": 0.0,
        "mscale_all_dim": 0.0,
    }
)
"""What absent keys of the rotary settings stand for."""


def rope_settings(settings: Settings, when_null: dict[str, Any] | None = None) -> Settings:
    """The rotary settings in the form of transformers 5, whichever form they have. UserError if both differ.

    transformers 4 keeps `rope_theta` beside a `rope_scaling`, 5 all of it in `rope_parameters`. `when_null` is what a
    `rope_scaling` of null stands for.
    """
    theta, scaling = settings.take("rope_theta"), settings.mapping("rope_scaling")
    if scaling and scaling.get("rope_theta", theta) != theta:
        raise UserError(
            f"{settings.where}: rope_theta is {theta!r}, and {scaling['rope_theta']!r} in rope_scaling, which only "
            "transformers 5 reads there; remove the wrong one"
        )
    old = {"rope_theta": theta, **_typed(when_null if scaling is None else scaling, settings.where)}
    new = settings.mapping("rope_parameters")
    if new is None:
        return Settings(old, ROPE, f"{settings.where}, rope_scaling")
    new = {"rope_theta": theta, **_typed(new, settings.where)}
    if settings.values.get("rope_scaling") is not None:
        differ = old != new
    else:
        differ = settings.values.get("rope_theta", new["rope_theta"]) != new["rope_theta"]
    if differ:
        raise UserError(
            f"{settings.where}: transformers 5 reads rope_parameters, {new!r}, and transformers 4 reads rope_theta and "
            f"rope_scaling, {old!r}, which is another model; remove the wrong ones"
        )
    return Settings(new, ROPE, f"{settings.where}, rope_parameters")


def _typed(values: dict[str, Any] | None, where: str) -> dict[str, Any]:
    """With the kind under one name: older files have `type` instead of `rope_type`, or both."""
    values = values or {}
    kinds = [values[key] for key in ("rope_type", "type") if values.get(key) is not None] or ["default"]
    if kinds[0] != kinds[-1]:
        raise UserError(f"{where}: rope_type = {kinds[0]!r} and type = {kinds[-1]!r} differ; remove the wrong one")
    return {key: value for key, value in values.items() if key != "type"} | {"rope_type": kinds[0]}


def read_rope(rope: Settings, max_seq_len: int, kind: type[RoPE] = RoPE, **more: Any) -> RoPE:
    """The position that `rope_settings` describe, of a model for `max_seq_len` tokens."""
    name = str(rope.take("rope_type"))
    if name not in READERS:
        raise UserError(f"{rope.where}: type {name!r} cannot be represented here; only {', '.join(READERS)}")
    position = kind(theta=rope.take("rope_theta"), scaling=READERS[name](rope, max_seq_len), **more)
    rope.finish()
    return position


def _read_yarn(settings: Settings, max_seq_len: int) -> YaRN:
    factor, magnitude = settings.number("factor"), settings.take("attention_factor")
    mscale, mscale_all_dim = settings.number("mscale"), settings.number("mscale_all_dim")
    if magnitude is None and mscale and mscale_all_dim:
        magnitude = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)
    return YaRN(
        factor=factor,
        original_max_seq_len=settings.take("original_max_position_embeddings") or max_seq_len,
        beta_fast=settings.take("beta_fast") or 32.0,
        beta_slow=settings.take("beta_slow") or 1.0,
        truncate=settings.take("truncate"),
        attention_factor=magnitude,
    )


def yarn_magnitude(factor: float, mscale: float) -> float:
    """DeepSeek's generalisation of YaRN's attention factor (arXiv 2405.04434, section 3.1.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_llama3(settings: Settings, max_seq_len: int) -> Llama3Scaling:
    return Llama3Scaling(
        factor=settings.take("factor"),
        original_max_seq_len=settings.take("original_max_position_embeddings") or max_seq_len,
        low_frequency_factor=settings.take("low_freq_factor"),
        high_frequency_factor=settings.take("high_freq_factor"),
    )


READERS = {
    "default": lambda settings, max_seq_len: None,
    "linear": lambda settings, max_seq_len: LinearScaling(factor=settings.take("factor")),
    "yarn": _read_yarn,
    "llama3": _read_llama3,
}


def write_rope(position: Position, **more: Any) -> dict[str, Any]:
    """The inverse, in both forms: transformers 5 reads either, 4 the first. `more` goes beside a scaling's settings."""
    rope = need(position, RoPE, "position")
    scaling = None if rope.scaling is None else _write_scaling(rope.scaling) | more
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": rope.theta, **(scaling or {"rope_type": "default"})},
    }


def _write_scaling(scaling: Scaling) -> dict[str, Any]:
    written: dict[str, Any] = {"rope_type": scaling.type_name, "factor": scaling.factor}
    if isinstance(scaling, YaRN):
        written |= {
            "original_max_position_embeddings": scaling.original_max_seq_len,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        if scaling.attention_factor is not None:
            written["attention_factor"] = scaling.attention_factor
    elif isinstance(scaling, Llama3Scaling):
        written |= {
            "original_max_position_embeddings": scaling.original_max_seq_len,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
        }
    elif not isinstance(scaling, LinearScaling):
        raise Misfit(f"position.scaling is {scaling.type_name!r}, which has no Hugging Face form")
    return written


# --- tensors ------------------------------------------------------------------------------------------------------


def frame_rules(spec: Transformer) -> Iterator[Rule]:
    """Everything but what is inside attention and feed-forward networks."""
    yield same("embedding.weight", "model.embed_tokens.weight")
    yield same("norm.weight", "model.norm.weight")
    if isinstance(spec.head, Untied):
        yield same("head.weight", "lm_head.weight")
    for i in range(len(spec.layers)):
        yield same(f"layers.{i}.attention_norm.weight", f"model.layers.{i}.input_layernorm.weight")
        yield same(f"layers.{i}.ffn_norm.weight", f"model.layers.{i}.post_attention_layernorm.weight")


def attention_rules(attention: GQA, ours: str, theirs: str) -> Iterator[Rule]:
    """Projections, and what belongs to the options."""
    layers = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    for mine, other in layers.items():
        yield same(f"{ours}.{mine}.weight", f"{theirs}.{other}.weight")
        if attention.output_bias if mine == "output" else attention.bias:
            yield same(f"{ours}.{mine}.bias", f"{theirs}.{other}.bias")
    if attention.qk_norm:
        yield same(f"{ours}.query_norm.weight", f"{theirs}.q_norm.weight")
        yield same(f"{ours}.key_norm.weight", f"{theirs}.k_norm.weight")
    if attention.attention_sinks:
        yield same(f"{ours}.sinks", f"{theirs}.sinks")


SWIGLU = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def swiglu_rules(ffn: SwiGLU, ours: str, theirs: str) -> Iterator[Rule]:
    """One network."""
    for mine, other in SWIGLU.items():
        yield same(f"{ours}.{mine}.weight", f"{theirs}.{other}.weight")
        if ffn.bias:
            yield same(f"{ours}.{mine}.bias", f"{theirs}.{other}.bias")


def expert_rules(experts: int, ours: str, theirs: str, names: dict[str, str] = SWIGLU) -> Iterator[Rule]:
    """Stacked networks here, a network per expert there."""
    for mine, other in names.items():
        separate = tuple(f"{theirs}.{e}.{other}.weight" for e in range(experts))
        yield Rule((f"{ours}.{mine}.weight",), separate, STACKED)
