"""Llama 1 to 3 (Touvron et al., arXiv 2302.13971): rotary positions, RMSNorm, grouped queries, SwiGLU."""

from collections.abc import Iterator
from typing import Any

from mosaic_dist.convert.hugging_face import common
from mosaic_dist.convert.hugging_face.canonical_form import canonical_form, need
from mosaic_dist.convert.hugging_face.rules import Rule
from mosaic_dist.convert.hugging_face.settings import Known, Settings
from mosaic_dist.model import GQA, Block, SwiGLU, Transformer

KNOWN = Known(
    common.DEFAULTS
    | {
        "attention_bias": False,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "mlp_bias": False,
    },
    {"is_llama_config": (True,), "rope_interleaved": (False,), "activation": ("swiglu",)},  # SmolLM2, Falcon3
)


def read(settings: Settings) -> Transformer:
    """config.json -> spec."""
    settings.skip("pretraining_tp")
    block = Block(
        attention=common.read_attention(settings, bias=settings.take("attention_bias")),
        ffn=SwiGLU(hidden_dim=settings.take("intermediate_size"), bias=settings.take("mlp_bias")),
    )
    frame = common.read_frame(settings)
    position = common.read_rope(common.rope_settings(settings), frame["max_seq_len"])
    return Transformer(position=position, layers=settings.count("num_hidden_layers") * (block,), **frame)


def write(spec: Transformer) -> dict[str, Any]:
    """Canonical spec -> config.json."""
    attention = need(spec.layers[0].attention, GQA, "layers[0].attention")
    ffn = need(spec.layers[0].ffn, SwiGLU, "layers[0].ffn")
    return {
        **common.write_frame(spec),
        **common.write_attention(attention),
        **common.write_rope(spec.position),
        "intermediate_size": ffn.hidden_dim,
        "attention_bias": attention.bias,
        "mlp_bias": ffn.bias,
    }


def rules(spec: Transformer, config: dict[str, Any]) -> Iterator[Rule]:
    """Tensors."""
    yield from common.frame_rules(spec)
    for i, block in enumerate(canonical_form(spec).layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, ffn = need(block.attention, GQA, "attention"), need(block.ffn, SwiGLU, "ffn")
        yield from common.attention_rules(attention, f"{ours}.attention", f"{theirs}.self_attn")
        yield from common.swiglu_rules(ffn, f"{ours}.ffn.network", f"{theirs}.mlp")
