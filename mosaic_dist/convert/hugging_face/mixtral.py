"""Mixtral (Jiang et al., arXiv 2401.04088): Llama with eight SwiGLU experts, of which each token takes two."""

from collections.abc import Iterator
from typing import Any

from mosaic_dist.convert.hugging_face import common
from mosaic_dist.convert.hugging_face.canonical_form import canonical_form, moe_layers, need
from mosaic_dist.convert.hugging_face.rules import Rule, same
from mosaic_dist.convert.hugging_face.settings import Known, Settings
from mosaic_dist.model import GQA, Block, MoE, SoftmaxTopK, SwiGLU, Transformer

EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}

KNOWN = Known(
    common.DEFAULTS
    | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.0,
    }
)


def read(settings: Settings) -> Transformer:
    """config.json -> spec."""
    settings.expect("router_jitter_noise", 0, 0.0)
    block = Block(
        attention=common.read_attention(settings, sliding_window=settings.take("sliding_window")),
        ffn=MoE(
            expert=SwiGLU(hidden_dim=settings.take("intermediate_size")),
            experts=settings.take("num_local_experts"),
            top_k=settings.take("num_experts_per_tok"),
            router=SoftmaxTopK(normalize=True),
        ),
    )
    frame = common.read_frame(settings)
    position = common.read_rope(common.rope_settings(settings), frame["max_seq_len"])
    return Transformer(position=position, layers=settings.count("num_hidden_layers") * (block,), **frame)


def write(spec: Transformer) -> dict[str, Any]:
    """Canonical spec -> config.json."""
    attention = need(spec.layers[0].attention, GQA, "layers[0].attention")
    mixture = moe_layers(spec)[0]
    return {
        **common.write_frame(spec),
        **common.write_attention(attention),
        **common.write_rope(spec.position),
        "sliding_window": attention.sliding_window,
        "intermediate_size": mixture.expert.hidden_dim,
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": mixture.top_k,
    }


def rules(spec: Transformer, config: dict[str, Any]) -> Iterator[Rule]:
    """Tensors."""
    yield from common.frame_rules(spec)
    for i, block in enumerate(canonical_form(spec).layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, mixture = need(block.attention, GQA, "attention"), need(block.ffn, MoE, "ffn")
        yield from common.attention_rules(attention, f"{ours}.attention", f"{theirs}.self_attn")
        yield same(f"{ours}.ffn.router.weight", f"{theirs}.block_sparse_moe.gate.weight")
        experts = f"{theirs}.block_sparse_moe.experts"
        yield from common.expert_rules(mixture.experts, f"{ours}.ffn.experts", experts, EXPERT)
