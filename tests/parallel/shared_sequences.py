"""Models whose attentions are of every kind, layouts that share their sequences, and the plain loop they must equal."""

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mosaic_dist.model import (
    GQA,
    MHA,
    MLA,
    MQA,
    ActivationCheckpointing,
    ALiBi,
    Block,
    DecoupledRoPE,
    Init,
    Learned,
    LinearAttention,
    MixtureOfExperts,
    MoE,
    NormalizedBlock,
    Position,
    RoPE,
    SwiGLU,
    Transformer,
)
from mosaic_dist.parallel import Engine, Parallel, World, fill_config
from mosaic_dist.targets import IGNORE_INDEX
from tests.parallel.mixed import LEARNING_RATE, OPTIMIZER, Plain

STEPS, BATCH, LENGTH, VOCAB, END, TOP_K = 3, 4, 16, 32, 5, 2
DENSE = SwiGLU(hidden_dim=16)


def experts(aux_loss_scope: str) -> MoE:
    """Four experts, whose loads count in the loss."""
    return MoE(expert=DENSE, experts=4, top_k=TOP_K, aux_loss_coef=0.2, z_loss_coef=0.05, aux_loss_scope=aux_loss_scope)


def model(position: Position, *blocks: Block | NormalizedBlock) -> Transformer:
    """Small."""
    return Transformer(
        vocab_size=VOCAB, dim=16, max_seq_len=LENGTH, init=Init(std=0.1), position=position, layers=blocks
    )


MODELS = {
    "gqa": model(RoPE(), Block(attention=GQA(heads=4, kv_heads=2, qk_norm=True), ffn=DENSE)),
    "rotary": model(
        RoPE(),
        Block(attention=MHA(heads=4, sliding_window=5, attention_sinks=True, bias=True),
        ffn=experts("micro_batch")), Block(attention=GQA(heads=8, kv_heads=2), ffn=DENSE),
        Block(attention=MQA(heads=4, head_dim=8), ffn=experts("sequence")),
        Block(attention=LinearAttention(heads=4, chunk=3), ffn=DENSE),
    ),
    "latent": model(
        DecoupledRoPE(rope_head_dim=4),
        Block(attention=MLA(heads=4, kv_compression_dim=8, q_compression_dim=8, v_head_dim=6), ffn=DENSE),
        Block(attention=MLA(heads=4, kv_compression_dim=8, sliding_window=7), ffn=experts("micro_batch")),
    ),
    "alibi": model(
        ALiBi(),
        Block(attention=MHA(heads=4, logit_softcap=2.0, kernel="explicit", attention_sinks=True),
        ffn=experts("sequence")), Block(attention=GQA(heads=4, kv_heads=2, attention_sinks=True), ffn=DENSE),
    ),
    "learned": model(
        Learned(), NormalizedBlock(attention=MHA(heads=4, qk_norm=True), ffn=experts("global_batch")),
    ),
}  # fmt: skip


class Case(NamedTuple):
    """A model in a layout."""

    model: str
    ranks: int
    shared: int
    """Ranks that share a sequence."""
    stage: int
    degree: int
    accumulation: int
    documents: bool
    recomputed: Literal["none", "full", "attention"] = "none"
    chunks: int = 1
    """Of experts."""

    def __str__(self) -> str:
        return "{}_w{}_s{}_z{}_e{}_a{}_d{:d}_{}_{}".format(*self)

    @property
    def data_ranks(self) -> int:
        """Groups that read different sequences."""
        return self.ranks // self.shared


CASES = [
    Case("gqa", 2, 2, 1, 1, 1, False),
    Case("gqa", 2, 2, 3, 1, 2, True),
    Case("rotary", 2, 2, 2, 2, 2, True),
    Case("rotary", 4, 4, 1, 1, 1, True),
    Case("rotary", 4, 2, 3, 4, 2, False, "full", 2),
    Case("rotary", 4, 4, 3, 2, 2, True),
    Case("latent", 2, 2, 3, 1, 1, True),
    Case("latent", 4, 4, 2, 2, 2, False, "attention"),
    Case("alibi", 2, 2, 0, 2, 1, False),
    Case("alibi", 4, 4, 1, 4, 2, True),
    Case("learned", 4, 4, 1, 2, 1, True),
    Case("learned", 4, 4, 0, 1, 2, False),
]


RESUMED = (
    Case("rotary", 4, 4, 1, 1, 1, True),
    Case("rotary", 4, 2, 3, 2, 1, True),
    Case("rotary", 4, 1, 2, 4, 1, True),
)
"""Layouts that a run goes on in, one after the other."""


def make_engine(world: World, case: Case) -> Engine:
    """The engine of this rank for a case."""
    config = fill_config(
        {"zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0}},
        precision="fp32",
        micro_batch_size=BATCH // case.data_ranks // case.accumulation,
        accumulation=case.accumulation,
        world_size=world.size,
        max_grad_norm=OPTIMIZER.max_grad_norm,
    )
    parallel = Parallel(
        sequence_parallel=case.shared,
        expert_chunks=case.chunks,
        activation_checkpointing=ActivationCheckpointing(parts=case.recomputed),
    )
    return Engine(MODELS[case.model], OPTIMIZER, config, case.degree, 0, world, parallel=parallel)


def my_part(engine: Engine) -> slice:
    """Rows of the global batch that this rank trains on."""
    share = BATCH // engine.sequences.data_ranks
    return slice(engine.sequences.data_rank * share, (engine.sequences.data_rank + 1) * share)


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per step inputs, targets and documents [BATCH, LENGTH] of the global batch; some tokens are not scored."""
    generator = torch.Generator().manual_seed(1)
    walk = torch.randint(0, 7, (STEPS, BATCH, LENGTH + 1), generator=generator).cumsum(-1) % VOCAB
    inputs, targets = walk[..., :-1].contiguous(), walk[..., 1:].contiguous()
    targets[:, 0, 2:] = IGNORE_INDEX
    targets[:, 2, :9] = IGNORE_INDEX
    ends = (inputs % END == 0).long()
    return list(zip(inputs, targets, ends.cumsum(-1) - ends, strict=True))


def questions(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs, targets and documents: of three rows that are asked, the first weights know the second alone.

    The first is wrong in the first part of its tokens, the third in the last, and the fourth is not asked.
    """
    inputs, _, numbers = batches()[0]
    documents = numbers if case.documents else None
    with torch.no_grad():
        targets = MODELS[case.model].build_initialized(0).eval()(inputs, documents_BT=documents).argmax(-1)
    targets[:, 2:-2] = IGNORE_INDEX
    targets[0, 1] = (targets[0, 1] + 1) % VOCAB
    targets[2, -1] = (targets[2, -1] + 1) % VOCAB
    targets[3] = IGNORE_INDEX
    return inputs, targets, documents


@cache
def plain_training(name: str, micro_batches: int, documents: bool) -> tuple[Plain, float]:
    """A model on one process, and its loss on the first batch afterwards."""
    network = MODELS[name].build_initialized(0)
    optimizer = OPTIMIZER.build(OPTIMIZER.groups(network))
    results: list[list[float]] = []
    gradients: dict[str, Tensor] = {}
    for whole in batches():
        scored, loss, auxiliary = (whole[1] != IGNORE_INDEX).sum(), 0.0, 0.0
        for inputs, targets, numbers in zip(*(tensor.chunk(micro_batches) for tensor in whole), strict=True):
            parts = network(inputs, targets, numbers if documents else None)
            (parts.cross_entropy_sum / scored + parts.auxiliary / micro_batches).backward()
            loss += parts.cross_entropy_sum.item() / scored.item()
            auxiliary += parts.auxiliary.item() / micro_batches
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMIZER.max_grad_norm)
        gradients = gradients or {key: p.grad.clone() for key, p in network.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        optimizer.step()
        optimizer.zero_grad()
        for layer in network.modules():
            if isinstance(layer, MixtureOfExperts):
                layer.end_step(None)
        results.append([loss, auxiliary, norm.item()])
    inputs, targets, numbers = batches()[0]
    with torch.no_grad():
        network.eval()
        total = network(inputs, targets, numbers if documents else None).cross_entropy_sum
    weights = {key: value.detach() for key, value in network.state_dict().items()}
    return Plain(results, gradients, weights), (total / (targets != IGNORE_INDEX).sum()).item()
