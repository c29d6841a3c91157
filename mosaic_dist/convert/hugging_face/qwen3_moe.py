"""Qwen3-MoE (arXiv 2505.09388): normalised queries and keys, fine-grained experts, dense layers by choice."""

from collections.abc import Iterator
from typing import Any

from mosaic_dist.convert.hugging_face import common
from mosaic_dist.convert.hugging_face.canonical_form import canonical_form, moe_layers, need
from mosaic_dist.convert.hugging_face.rules import Rule, same
from mosaic_dist.convert.hugging_face.settings import Known, Settings
from mosaic_dist.model import GQA, Block, MoE, RMSNorm, SoftmaxTopK, SwiGLU, Transformer

KNOWN = Known(
    common.DEFAULTS
    | {
        "attention_bias": False,
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    {"qkv_bias": (False,), "use_qk_norm": (True,), "shared_expert_intermediate_size": (0, None)},  # Qwen3-Coder
)


def read(settings: Settings) -> Transformer:
    """config.json -> spec."""
    settings.skip("max_window_layers")
    sliding = settings.take("use_sliding_window")
    window = settings.take("sliding_window")
    attention = common.read_attention(
        settings,
        bias=settings.take("attention_bias"),
        qk_norm=True,
        qk_norm_eps=settings.take("rms_norm_eps"),
        sliding_window=window if sliding else None,
    )
    mixture = MoE(
        expert=SwiGLU(hidden_dim=settings.take("moe_intermediate_size")),
        experts=_read_experts(settings),
        top_k=settings.take("num_experts_per_tok"),
        router=SoftmaxTopK(normalize=settings.take("norm_topk_prob")),
    )
    dense = SwiGLU(hidden_dim=settings.take("intermediate_size"))
    step, dense_layers = int(settings.number("decoder_sparse_step")), settings.items("mlp_only_layers")
    blocks = tuple(
        Block(attention=attention, ffn=dense if i in dense_layers or (i + 1) % max(step, 1) else mixture)
        for i in range(settings.count("num_hidden_layers"))
    )
    frame = common.read_frame(settings)
    position = common.read_rope(common.rope_settings(settings), frame["max_seq_len"])
    return Transformer(position=position, layers=blocks, **frame)


def _read_experts(settings: Settings) -> int:
    """`num_experts`, which transformers 5 writes as `num_local_experts`."""
    if "num_local_experts" not in settings.values:
        return settings.take("num_experts")
    experts = settings.count("num_local_experts")
    if "num_experts" in settings.values:
        settings.expect("num_experts", experts)
    return experts


def write(spec: Transformer) -> dict[str, Any]:
    """Canonical spec -> config.json."""
    attention = need(spec.layers[0].attention, GQA, "layers[0].attention")
    dense = {i: block.ffn for i, block in enumerate(spec.layers) if not isinstance(block.ffn, MoE)}
    mixture = moe_layers(spec)[0]
    width = need(dense[min(dense)], SwiGLU, f"layers[{min(dense)}].ffn").hidden_dim if dense else 4 * spec.dim
    return {
        **common.write_frame(spec),
        **common.write_attention(attention),
        **common.write_rope(spec.position),
        "rms_norm_eps": need(spec.norm, RMSNorm, "norm").eps,
        "attention_bias": attention.bias,
        "use_sliding_window": attention.sliding_window is not None,
        "sliding_window": attention.sliding_window,
        "intermediate_size": width,
        "moe_intermediate_size": mixture.expert.hidden_dim,
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.top_k,
        "norm_topk_prob": need(mixture.router, SoftmaxTopK, "router").normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(dense),
    }


def rules(spec: Transformer, config: dict[str, Any]) -> Iterator[Rule]:
    """Tensors."""
    yield from common.frame_rules(spec)
    for i, block in enumerate(canonical_form(spec).layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention = need(block.attention, GQA, "attention")
        yield from common.attention_rules(attention, f"{ours}.attention", f"{theirs}.self_attn")
        if isinstance(block.ffn, MoE):
            yield same(f"{ours}.ffn.router.weight", f"{theirs}.mlp.gate.weight")
            yield from common.expert_rules(block.ffn.experts, f"{ours}.ffn.experts", f"{theirs}.mlp.experts")
        else:
            yield from common.swiglu_rules(need(block.ffn, SwiGLU, "ffn"), f"{ours}.ffn.network", f"{theirs}.mlp")
