"""gpt-oss (OpenAI, arXiv 2508.10925): attention sinks, every other layer in a window, biased clamped SwiGLU experts."""

from collections.abc import Iterator
from typing import Any

from mosaic_dist.convert.hugging_face import common
from mosaic_dist.convert.hugging_face.canonical_form import canonical_form, moe_layers, need
from mosaic_dist.convert.hugging_face.rules import INTERLEAVED, Rule, same
from mosaic_dist.convert.hugging_face.settings import Known, Settings
from mosaic_dist.errors import UserError
from mosaic_dist.model import GQA, Block, ClampedSwiGLU, MoE, TopKSoftmax, Transformer

SLIDING, FULL = "sliding_attention", "full_attention"
ALPHA = 1.702
LIMIT = 7.0
SWIGLU_IS_READ = (5, 19)
"""The first transformers that takes alpha and limit from config.json; older ones always use those above."""

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
KNOWN = Known(
    common.DEFAULTS
    | {
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_scaling": YARN,
        "sliding_window": 128,
        "layer_types": None,  # sliding and full attention take turns
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": LIMIT,
        "swiglu_alpha": ALPHA,
    }
)


def read(settings: Settings) -> Transformer:
    """config.json -> spec."""
    if (settings.version() or (0, 0)) < SWIGLU_IS_READ:
        settings.expect("swiglu_limit", LIMIT)
        settings.expect("swiglu_alpha", ALPHA)
    settings.skip("initial_context_length", "experts_per_token")  # repeat others under OpenAI's own names
    ffn = MoE(
        expert=ClampedSwiGLU(
            hidden_dim=settings.take("intermediate_size"),
            bias=True,
            limit=settings.take("swiglu_limit"),
            alpha=settings.take("swiglu_alpha"),
        ),
        experts=settings.take("num_local_experts"),
        top_k=settings.take("num_experts_per_tok"),
        router=TopKSoftmax(),
        router_bias=True,
    )
    bias, window = settings.take("attention_bias"), settings.take("sliding_window")
    layers = settings.count("num_hidden_layers")
    types = settings.items("layer_types") or [FULL if i % 2 else SLIDING for i in range(layers)]
    if len(types) != layers or any(kind not in (SLIDING, FULL) for kind in types):
        raise UserError(f"config.json: layer_types = {types!r} should be {layers} of {SLIDING!r} and {FULL!r}")
    blocks = tuple(
        Block(
            attention=common.read_attention(
                settings, bias=bias, attention_sinks=True, sliding_window=window if kind == SLIDING else None
            ),
            ffn=ffn,
        )
        for kind in types
    )
    frame = common.read_frame(settings)
    position = common.read_rope(common.rope_settings(settings, _null_scaling(settings)), frame["max_seq_len"])
    return Transformer(position=position, layers=blocks, **frame)


def _null_scaling(settings: Settings) -> dict[str, Any] | None:
    """What a `rope_scaling` of null stands for: none in transformers 4, and the default, YaRN, in transformers 5."""
    if settings.take("rope_scaling") is not None or settings.take("rope_parameters") is not None:
        return None
    version = settings.version()
    if version is None:
        raise UserError(
            f"{settings.where}: rope_scaling = None means no scaling to transformers 4 and YaRN to transformers 5, and "
            'there is no transformers_version; write {"rope_type": "default"} for no scaling, or remove it for YaRN'
        )
    return YARN if version >= (5, 0) else None


def write(spec: Transformer) -> dict[str, Any]:
    """Canonical spec -> config.json."""
    attentions = [need(block.attention, GQA, f"layers[{i}].attention") for i, block in enumerate(spec.layers)]
    mixture = moe_layers(spec)[0]
    windows = [attention.sliding_window for attention in attentions if attention.sliding_window is not None]
    rope = common.write_rope(spec.position)
    return {
        **common.write_frame(spec),
        **common.write_attention(attentions[0]),
        **rope,
        "rope_scaling": rope["rope_scaling"] or {"rope_type": "default"},  # null would mean YaRN to transformers 5
        "attention_bias": attentions[0].bias,
        "sliding_window": windows[0] if windows else spec.max_seq_len,
        "layer_types": [FULL if attention.sliding_window is None else SLIDING for attention in attentions],
        "intermediate_size": mixture.expert.hidden_dim,
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": mixture.top_k,
        "swiglu_limit": LIMIT,
        "swiglu_alpha": ALPHA,
    }


def rules(spec: Transformer, config: dict[str, Any]) -> Iterator[Rule]:
    """Tensors. Experts are stacked as ours are; gate and up take turns in one matrix."""
    yield from common.frame_rules(spec)
    for i, block in enumerate(canonical_form(spec).layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention = need(block.attention, GQA, "attention")
        yield from common.attention_rules(attention, f"{ours}.attention", f"{theirs}.self_attn")
        for kind, ending in (("weight", ""), ("bias", "_bias")):
            yield same(f"{ours}.ffn.router.{kind}", f"{theirs}.mlp.router.{kind}")
            halves = tuple(f"{ours}.ffn.experts.{name}.{kind}" for name in ("gate", "up"))
            yield Rule(halves, (f"{theirs}.mlp.experts.gate_up_proj{ending}",), INTERLEAVED)
            yield same(f"{ours}.ffn.experts.down.{kind}", f"{theirs}.mlp.experts.down_proj{ending}")
