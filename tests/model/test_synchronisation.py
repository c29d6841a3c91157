"""On a GPU the host does not wait within a forward and backward pass, so that it can be ahead of the device."""

from dataclasses import replace

import pytest
import torch

from mosaic_dist.model import (
    GQA,
    MHA,
    ALiBi,
    Block,
    MoE,
    Position,
    RoPE,
    SigmoidTopK,
    SwiGLU,
    Transformer,
)
from mosaic_dist.model.ffn.kernel import has_grouped_product
from mosaic_dist.optim import AdamW

T = 64
MIXTURE = MoE(expert=SwiGLU(hidden_dim=64), experts=4, top_k=2, shared_experts=1, z_loss_coef=0.1, jitter=0.1)
GROUPED = torch.cuda.is_available() and has_grouped_product(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not GROUPED, reason="elsewhere the host asks how many rows each expert has")
@pytest.mark.parametrize("position", [RoPE(), ALiBi()], ids=["rope", "alibi"])
def test_a_step_waits_for_nothing(position: Position):
    """But for the exchange's read under expert parallelism, and what the engine reads at the end of a step."""
    sigmoid = replace(MIXTURE, router=SigmoidTopK(num_groups=2), aux_loss_scope="sequence")
    spec = Transformer(
        vocab_size=128,
        dim=64,
        max_seq_len=T,
        position=position,
        layers=(
            Block(attention=GQA(heads=4, kv_heads=2), ffn=SwiGLU(hidden_dim=64), dropout=0.1),
            Block(attention=MHA(heads=4, sliding_window=16), ffn=MIXTURE),
            Block(attention=MHA(heads=4), ffn=sigmoid),
        ),
    )
    model = spec.build_initialized(0, "cuda").bfloat16()
    optimizer = AdamW(learning_rate=1e-3)
    update = optimizer.build(optimizer.groups(model))
    tokens_BT = torch.randint(0, 128, (4, T + 1), device="cuda")
    documents_BT = (torch.arange(T, device="cuda") > T // 2).long().expand(4, -1)

    def step() -> None:
        parts = model(tokens_BT[:, :-1], tokens_BT[:, 1:], documents_BT)
        (parts.cross_entropy_sum / tokens_BT.numel() + parts.auxiliary).backward()
        update.step()
        update.zero_grad()

    step()  # the first one moves the positions' constants and starts libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
