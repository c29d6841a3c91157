"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, weights of Conv1D layers."""

from collections.abc import Iterator
from typing import Any

from mosaic_dist.convert.hugging_face.canonical_form import need
from mosaic_dist.convert.hugging_face.rules import FUSED, TRANSPOSED, Rule, same
from mosaic_dist.convert.hugging_face.settings import Known, Settings
from mosaic_dist.model import GELU, GQA, MHA, Block, LayerNorm, Learned, Tied, Transformer, Untied

TRAINING = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "reorder_and_upcast_attn")
"""Dropout is the run's; `n_ctx` repeats `n_positions`; the last changes the precision of scores in float16 only."""

EOS_ROLES = ("bos_token", "unk_token")
"""What the EOS also is where a tokenizer has no token of its own for it, as in GPT-2's tokenizer: tools need both."""

CLASSIFIER = ("type", "use_proj", "activation", "first_dropout", "proj_to_labels")

KNOWN = Known(
    {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,  # 4 * n_embd
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    },
    {"_num_labels": (1,)},
)


def read(settings: Settings) -> Transformer:
    """config.json -> spec."""
    settings.expect("activation_function", "gelu_new", "gelu_pytorch_tanh")
    settings.expect("scale_attn_weights", True)
    settings.expect("scale_attn_by_inverse_layer_idx", False)
    settings.skip(*TRAINING, *(f"summary_{name}" for name in CLASSIFIER))
    dim = settings.count("n_embd")
    block = Block(
        attention=MHA(heads=settings.take("n_head"), bias=True),
        ffn=GELU(hidden_dim=settings.take("n_inner") or 4 * dim, bias=True),
    )
    return Transformer(
        vocab_size=settings.take("vocab_size"),
        dim=dim,
        max_seq_len=settings.take("n_positions"),
        position=Learned(),
        layers=settings.count("n_layer") * (block,),
        norm=LayerNorm(eps=settings.take("layer_norm_epsilon")),
        head=Tied() if settings.take("tie_word_embeddings") else Untied(),
    )


def write(spec: Transformer) -> dict[str, Any]:
    """Canonical spec -> config.json."""
    return {
        "vocab_size": spec.vocab_size,
        "n_embd": spec.dim,
        "n_positions": spec.max_seq_len,
        "n_ctx": spec.max_seq_len,  # llama.cpp's converter reads this one
        "n_layer": len(spec.layers),
        "n_head": need(spec.layers[0].attention, GQA, "layers[0].attention").heads,
        "n_inner": need(spec.layers[0].ffn, GELU, "layers[0].ffn").hidden_dim,
        "layer_norm_epsilon": need(spec.norm, LayerNorm, "norm").eps,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": isinstance(spec.head, Tied),
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def rules(spec: Transformer, config: dict[str, Any]) -> Iterator[Rule]:
    """Tensors."""
    yield same("embedding.weight", "transformer.wte.weight")
    yield same("position.weight", "transformer.wpe.weight")
    if isinstance(spec.head, Untied):
        yield same("head.weight", "lm_head.weight")
    for kind in ("weight", "bias"):
        yield same(f"norm.{kind}", f"transformer.ln_f.{kind}")
    for i in range(len(spec.layers)):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            yield same(f"{ours}.attention_norm.{kind}", f"{theirs}.ln_1.{kind}")
            yield same(f"{ours}.ffn_norm.{kind}", f"{theirs}.ln_2.{kind}")
            heads = tuple(f"{ours}.attention.{name}.{kind}" for name in ("query", "key", "value"))
            yield Rule(heads, (f"{theirs}.attn.c_attn.{kind}",), FUSED)
        for mine, other in (
            ("attention.output", "attn.c_proj"),
            ("ffn.network.up", "mlp.c_fc"),
            ("ffn.network.down", "mlp.c_proj"),
        ):
            yield same(f"{ours}.{mine}.weight", f"{theirs}.{other}.weight", TRANSPOSED)
            yield same(f"{ours}.{mine}.bias", f"{theirs}.{other}.bias")
