"""Documents of sequences that are too long for a mask become sequences of their own, with the same numbers."""

import pytest
import torch
from torch import Tensor

from mosaic_dist.model import GQA, MLA, Block, DecoupledRoPE, MoESwiGLU, RoPE, SwiGLU, Transformer
from mosaic_dist.model.attention import blocks

V, T = 64, 640
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SPECS = {
    "gqa": (GQA(heads=4, kv_heads=2), RoPE()),
    "sinks and a window": (GQA(heads=4, kv_heads=2, attention_sinks=True, sliding_window=48), RoPE()),
    "mla": (MLA(heads=4, kv_compression_dim=16), DecoupledRoPE(rope_head_dim=8)),
}


def numbers(spec: Transformer, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss and gradients of two packed sequences, in float32 on the CPU."""
    model = spec.build_initialized(0).to(device, dtype)
    tokens_BT = torch.randint(0, V, (2, T + 1), generator=torch.Generator().manual_seed(1)).to(device)
    ends = torch.tensor([[3, 200, 201, 531], [64, 65, 400, 639]], device=device)
    documents_BT = (torch.arange(T, device=device)[None, :, None] >= ends[:, None]).sum(-1)
    parts = model(tokens_BT[:, :-1], tokens_BT[:, 1:], documents_BT)
    (parts.cross_entropy_sum / (2 * T) + parts.auxiliary).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: x.detach().float().cpu() for name, x in {"loss": parts.cross_entropy_sum, **gradients}.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SPECS)
def test_long_documents_are_what_a_mask_shows(name, device, monkeypatch):
    """The mask on the CPU in float32 tells what is right; in bfloat16 a choice of experts turns here and there."""
    attention, position = SPECS[name]
    block = Block(attention=attention, ffn=SwiGLU(hidden_dim=64))
    sparse = Block(attention=attention, ffn=MoESwiGLU(hidden_dim=32, experts=4))
    spec = Transformer(vocab_size=V, dim=64, max_seq_len=T, position=position, layers=(block, sparse))
    found = {dtype: numbers(spec, device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(blocks, "MASKED_TOKENS", T)
    exact = numbers(spec, "cpu", torch.float32)
    torch.testing.assert_close(found[torch.float32], exact, rtol=1e-3, atol=1e-4)
    rounded = found[torch.bfloat16]
    squares = [
        ((rounded[key] - exact[key]).square().sum(), exact[key].square().sum()) for key in exact if key != "loss"
    ]
    assert (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt() < 0.1
    torch.testing.assert_close(rounded["loss"], exact["loss"], rtol=1e-2, atol=0.0)
