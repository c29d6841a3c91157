"""What grows, in which steps, with what else held fixed, and the order that a step's cost should have in it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mosaic_dist.model import (
    GQA,
    ActivationCheckpointing,
    Attention,
    Block,
    LinearAttention,
    Loss,
    MoE,
    RMSNorm,
    RoPE,
    SwiGLU,
    Tied,
    Transformer,
)


@dataclass(frozen=True)
class Case:
    """A step that is measured: `micro_batch_size` sequences of `seq_len` tokens on each of `ranks` ranks."""

    model: Transformer
    seq_len: int
    micro_batch_size: int = 1
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()  # noqa: RUF009 - a frozen value
    ranks: int = 1
    expert_parallel: int = 1


class Cost(NamedTuple):
    """What is measured of a step; as `Axis.expected`, the exponents that these should have."""

    seconds: float
    """Forward and backward."""
    update_seconds: float
    kept_bytes: float
    """Tensors that the forward pass leaves for the backward pass."""
    peak_bytes: float
    """All tensors at the fullest moment: weights, optimizer states, gradients, activations."""


class Axis(NamedTuple):
    """One thing that grows; axes of the same `panel` are drawn together."""

    panel: str
    name: str
    sizes: tuple[int, ...]
    case: Callable[[int], Case]
    expected: Cost


def dense(dim: int, layers: int, attention: Attention, vocab: int, context: int, chunk_tokens: int) -> Transformer:
    """A plain model whose feed-forward networks are twice as wide as itself."""
    blocks = layers * (Block(attention=attention, ffn=SwiGLU(hidden_dim=2 * dim)),)
    loss = Loss(chunk_tokens=chunk_tokens)
    words = {"position": RoPE(), "norm": RMSNorm(), "head": Tied(), "loss": loss}
    return Transformer(vocab_size=vocab, dim=dim, max_seq_len=context, layers=blocks, **words)


def of_batch(size: int) -> Case:
    """Sequences of a micro-batch."""
    return Case(dense(256, 2, GQA(heads=4, kv_heads=2), 512, 256, 256), 256, micro_batch_size=size)


def of_layers(size: int) -> Case:
    """Layers."""
    return Case(dense(128, size, GQA(heads=4, kv_heads=2), 512, 256, 256), 256, micro_batch_size=4)


def of_vocabulary(size: int) -> Case:
    """Words; the loss is computed for 128 tokens at a time."""
    return Case(dense(64, 1, GQA(heads=2, kv_heads=1), size, 256, 128), 256, micro_batch_size=2)


def of_context(attention: Attention) -> Callable[[int], Case]:
    """Tokens of one sequence; the loss in chunks, the layer recomputed."""
    return lambda size: Case(
        dense(64, 1, attention, 256, size, 512), size, activation_checkpointing=ActivationCheckpointing(parts="full")
    )


def mixture(experts: int, dim: int, width: int, context: int) -> Transformer:
    """One layer with experts, of which each token takes two."""
    ffn = MoE(expert=SwiGLU(hidden_dim=width), experts=experts, top_k=2)
    block = Block(attention=GQA(heads=4, kv_heads=2), ffn=ffn)
    words = {"position": RoPE(), "norm": RMSNorm(), "head": Tied()}
    return Transformer(vocab_size=512, dim=dim, max_seq_len=context, layers=(block,), **words)


def of_experts(size: int) -> Case:
    """Experts of the same width, two for each of 4,096 tokens."""
    return Case(mixture(size, 256, 256, 256), 256, micro_batch_size=16)


def of_expert_parallel(size: int) -> Case:
    """Of four ranks, those that share the experts; the model and the tokens of all ranks stay."""
    return Case(mixture(16, 256, 256, 256), 256, micro_batch_size=4, ranks=4, expert_parallel=size)


def doubled(first: int, last: int) -> tuple[int, ...]:
    """From the first to the last, each twice the one before."""
    return (first, *(doubled(2 * first, last) if first < last else ()))


CONTEXTS = doubled(512, 131_072)
QUERIES = {"heads": 2, "kv_heads": 1}
AXES = (
    Axis("micro-batch (sequences)", "batch", doubled(1, 16), of_batch, Cost(1, 0, 1, 1)),
    Axis("context (tokens)", "context, full", CONTEXTS, of_context(GQA(**QUERIES)), Cost(2, 0, 1, 1)),
    Axis(
        "context (tokens)",
        "context, window",
        CONTEXTS,
        of_context(GQA(**QUERIES, sliding_window=256)),
        Cost(1, 0, 1, 1),
    ),
    Axis("context (tokens)", "context, linear", CONTEXTS, of_context(LinearAttention(heads=2)), Cost(1, 0, 1, 1)),
    Axis("experts, two per token", "experts", doubled(8, 128), of_experts, Cost(0, 1, 0, 1)),
    Axis("vocabulary", "vocabulary", doubled(4096, 262_144), of_vocabulary, Cost(1, 1, 1, 1)),
    Axis("expert-parallel degree of 4 ranks", "expert parallel", doubled(1, 4), of_expert_parallel, Cost(0, 0, 0, 0)),
    Axis("layers", "layers", doubled(1, 16), of_layers, Cost(1, 1, 1, 1)),
)
