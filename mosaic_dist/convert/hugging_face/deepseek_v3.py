"""DeepSeek-V3 (arXiv 2412.19437): latent attention, a few dense layers, then fine-grained and shared experts."""

import math
import re
from collections.abc import Iterator
from typing import Any

from mosaic_dist.convert.hugging_face import common
from mosaic_dist.convert.hugging_face.canonical_form import canonical_form, moe_layers, need
from mosaic_dist.convert.hugging_face.rules import AS_IS, Layout, Rule, neighbour_pairs, same
from mosaic_dist.convert.hugging_face.settings import Known, Settings
from mosaic_dist.model import MLA, Block, DecoupledRoPE, MoE, SigmoidTopK, SwiGLU, Transformer, YaRN

KNOWN = Known(
    common.DEFAULTS
    | {
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "attention_bias": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    {"num_nextn_predict_layers": range(1, 100)},
)


def read(settings: Settings) -> Transformer:
    """config.json -> spec."""
    settings.expect("attention_bias", False)
    settings.expect("scoring_func", "sigmoid")
    settings.expect("topk_method", "noaux_tc")
    settings.expect("moe_layer_freq", 1)
    settings.expect("ep_size", 1)
    settings.skip("pretraining_tp", "aux_loss_alpha", "seq_aux")  # the training's
    settings.skip("rope_interleave")  # the tensor map's
    heads, rope = settings.count("num_attention_heads"), common.rope_settings(settings)
    plain, rotary = settings.count("qk_nope_head_dim"), settings.count("qk_rope_head_dim")
    for key, value in {"num_key_value_heads": heads, "head_dim": rotary, "qk_head_dim": plain + rotary}.items():
        settings.expect(key, value, None)
    attention = MLA(
        heads=heads,
        kv_compression_dim=settings.take("kv_lora_rank"),
        q_compression_dim=settings.take("q_lora_rank"),
        head_dim=plain,
        v_head_dim=settings.take("v_head_dim"),
        softmax_scale=_score_scale(rope),
    )
    sparse = Block(attention=attention, ffn=_read_mixture(settings))
    dense = Block(attention=attention, ffn=SwiGLU(hidden_dim=settings.take("intermediate_size")))
    layers = settings.count("num_hidden_layers")
    dense_layers = min(int(settings.number("first_k_dense_replace")), layers)
    blocks = dense_layers * (dense,) + (layers - dense_layers) * (sparse,)
    frame = common.read_frame(settings)
    position = common.read_rope(rope, frame["max_seq_len"], DecoupledRoPE, rope_head_dim=rotary)
    return Transformer(position=position, layers=blocks, **frame)


def _read_mixture(settings: Settings) -> MoE:
    return MoE(
        expert=SwiGLU(hidden_dim=settings.take("moe_intermediate_size")),
        experts=settings.take("n_routed_experts"),
        top_k=settings.take("num_experts_per_tok"),
        shared_experts=settings.take("n_shared_experts"),
        router=SigmoidTopK(
            normalize=settings.take("norm_topk_prob"),
            scale=settings.take("routed_scaling_factor"),
            num_groups=settings.take("n_group"),
            topk_groups=settings.take("topk_group"),
        ),
        aux_loss_coef=0.0,  # the expert bias balances
    )


def _score_scale(rope: Settings) -> float:
    """YaRN's sharpening of all score dimensions, which the rotary ones alone cannot express."""
    if rope.take("rope_type") != "yarn":
        return 1.0
    mscale = rope.number("mscale_all_dim")
    return common.yarn_magnitude(rope.number("factor"), mscale) ** 2 if mscale else 1.0


def write(spec: Transformer) -> dict[str, Any]:
    """Canonical spec -> config.json."""
    attention = need(spec.layers[0].attention, MLA, "layers[0].attention")
    position = need(spec.position, DecoupledRoPE, "position")
    dense = [block.ffn for block in spec.layers if not isinstance(block.ffn, MoE)]
    mixture = moe_layers(spec)[0]
    router = need(mixture.router, SigmoidTopK, f"layers[{len(dense)}].ffn.router")
    sharpened: dict[str, float] = {}
    if attention.softmax_scale != 1.0 and isinstance(position.scaling, YaRN):
        mscale = (math.sqrt(attention.softmax_scale) - 1) / (0.1 * math.log(position.scaling.factor))
        sharpened = {"mscale_all_dim": round(mscale, 12)}
    return {
        **common.write_frame(spec),
        **common.write_rope(position, **sharpened),
        "rope_interleave": True,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.heads,
        "kv_lora_rank": attention.kv_compression_dim,
        "q_lora_rank": attention.q_compression_dim,
        "qk_nope_head_dim": attention.head_dim,
        "qk_rope_head_dim": position.rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "first_k_dense_replace": len(dense),
        "intermediate_size": need(dense[0], SwiGLU, "layers[0].ffn").hidden_dim if dense else 4 * spec.dim,
        "moe_intermediate_size": mixture.expert.hidden_dim,
        "n_routed_experts": mixture.experts,
        "n_shared_experts": mixture.shared_experts,
        "num_experts_per_tok": mixture.top_k,
        "norm_topk_prob": router.normalize,
        "routed_scaling_factor": router.scale,
        "n_group": router.num_groups,
        "topk_group": router.topk_groups,
        "num_nextn_predict_layers": 0,  # 1 is the class's default in transformers 5
    }


def is_prediction_layer(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor is of the layers behind the others that predict further tokens; transformers leaves them out."""
    layers, predicting = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return bool(match and layers and predicting and layers <= int(match[1]) < layers + predicting)


def rules(spec: Transformer, config: dict[str, Any]) -> Iterator[Rule]:
    """Tensors."""
    yield from common.frame_rules(spec)
    rotary = need(spec.position, DecoupledRoPE, "position").rope_head_dim
    interleaved = config.get("rope_interleave", True)
    for i, block in enumerate(canonical_form(spec).layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention = need(block.attention, MLA, "attention")
        yield from _attention_rules(attention, f"{ours}.attention", f"{theirs}.self_attn", rotary, interleaved)
        if isinstance(block.ffn, MoE):
            yield from _mixture_rules(block.ffn, f"{ours}.ffn", f"{theirs}.mlp")
        else:
            yield from common.swiglu_rules(need(block.ffn, SwiGLU, "ffn"), f"{ours}.ffn.network", f"{theirs}.mlp")


def _attention_rules(attention: MLA, ours: str, theirs: str, rotary: int, interleaved: bool) -> Iterator[Rule]:
    def order(heads: int, plain: int | None) -> Layout:
        return neighbour_pairs(heads, plain or 0, rotary) if interleaved else AS_IS

    query = order(attention.heads, attention.head_dim)
    if attention.q_compression_dim is None:
        yield same(f"{ours}.query.weight", f"{theirs}.q_proj.weight", query)
    else:
        yield same(f"{ours}.query_down.weight", f"{theirs}.q_a_proj.weight")
        yield same(f"{ours}.query_norm.weight", f"{theirs}.q_a_layernorm.weight")
        yield same(f"{ours}.query.weight", f"{theirs}.q_b_proj.weight", query)
    down = order(1, attention.kv_compression_dim)
    yield same(f"{ours}.kv_down.weight", f"{theirs}.kv_a_proj_with_mqa.weight", down)
    yield same(f"{ours}.kv_norm.weight", f"{theirs}.kv_a_layernorm.weight")
    yield same(f"{ours}.kv_up.weight", f"{theirs}.kv_b_proj.weight")
    yield same(f"{ours}.output.weight", f"{theirs}.o_proj.weight")


def _mixture_rules(mixture: MoE, ours: str, theirs: str) -> Iterator[Rule]:
    yield same(f"{ours}.router.weight", f"{theirs}.gate.weight")
    yield same(f"{ours}.router.expert_bias", f"{theirs}.gate.e_score_correction_bias")
    yield from common.expert_rules(mixture.experts, f"{ours}.experts", f"{theirs}.experts")
    if mixture.shared_experts:
        shared = need(mixture.expert, SwiGLU, "expert")
        yield from common.swiglu_rules(shared, f"{ours}.shared", f"{theirs}.shared_experts")
