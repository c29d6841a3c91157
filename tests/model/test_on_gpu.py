"""Every part computes on a GPU what it computes on a CPU."""

import itertools

import pytest
import torch
from torch import Tensor

from mosaic_dist.model import GQA, MHA, Block, Loss, MoESwiGLU, RoPE, SwiGLU, Transformer
from mosaic_dist.model.moe.assignment import assign
from tests.model.test_linear_kinds import ATTENTIONS, FFNS, POSITIONS, REFUSED

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
V, T = 64, 96
PAIRS = [pair for pair in itertools.product(ATTENTIONS, POSITIONS) if pair not in REFUSED]


def numbers(spec: Transformer, device: torch.device, dtype: torch.dtype, with_documents: bool) -> dict[str, Tensor]:
    """Loss and gradients, in float32 on the CPU."""
    model = spec.build_initialized(0).to(device, dtype)
    tokens_BT = torch.randint(0, V, (4, T + 1), generator=torch.Generator().manual_seed(1)).to(device)
    documents_BT = (torch.arange(T, device=device) // 40).expand(4, -1) if with_documents else None
    parts = model(tokens_BT[:, :-1], tokens_BT[:, 1:], documents_BT)
    loss = parts.cross_entropy_sum / (4 * T) + parts.auxiliary
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: tensor.detach().float().cpu() for name, tensor in {"loss": loss, **found}.items()}


def check(spec: Transformer, with_documents: bool = False) -> None:
    """float32 differs by rounding. bfloat16 is about as near to it as on a CPU; some choices of experts turn."""
    cpu = torch.device("cpu")
    exact, there = (numbers(spec, device, torch.float32, with_documents) for device in (cpu, DEVICE))
    torch.testing.assert_close(there, exact, rtol=1e-3, atol=1e-4)
    errors = {}
    for device in (cpu, DEVICE):
        rounded = numbers(spec, device, torch.bfloat16, with_documents)
        squares = [((rounded[name] - exact[name]).square().sum(), exact[name].square().sum()) for name in exact]
        errors[device] = (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt().item()
    assert errors[DEVICE] < 2 * errors[cpu] + 0.02, errors


@pytest.mark.parametrize(("attention", "position"), PAIRS)
def test_attention(attention, position):
    block = Block(attention=ATTENTIONS[attention], ffn=SwiGLU(hidden_dim=64))
    spec = Transformer(vocab_size=V, dim=64, max_seq_len=T, position=POSITIONS[position], layers=2 * (block,))
    check(spec)
    check(spec, with_documents=True)


@pytest.mark.parametrize("ffn", FFNS)
def test_feed_forward(ffn):
    block = Block(attention=GQA(heads=4, kv_heads=2), ffn=FFNS[ffn])
    check(Transformer(vocab_size=V, dim=64, max_seq_len=T, position=RoPE(), layers=2 * (block,)))


def test_experts_of_widths_that_no_kernel_takes():
    block = Block(attention=MHA(heads=2), ffn=MoESwiGLU(hidden_dim=20, experts=4))
    check(Transformer(vocab_size=V, dim=60, max_seq_len=T, position=RoPE(), layers=2 * (block,)))


def test_experts_without_rows_have_zero_gradients():
    """The product may leave them as it found them: here memory that held NaN."""
    experts = SwiGLU(hidden_dim=64).build_experts(64, 64, 4).to(DEVICE, torch.bfloat16)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x_SD = torch.randn(256, 64, device=DEVICE, dtype=torch.bfloat16)
    chosen_SK = torch.tensor([0, 2], device=DEVICE).expand(256, -1)
    rows = assign(torch.rand(256, 2, device=DEVICE), chosen_SK, None, 4)
    junk = [torch.full_like(experts.down.weight, torch.nan) for _ in range(64)]
    del junk
    experts(x_SD, rows).square().mean().backward()
    for parameter in experts.parameters():
        assert parameter.grad[[1, 3]].eq(0).all()
        assert parameter.grad[[0, 2]].isfinite().all()
        assert parameter.grad[[0, 2]].any()


def test_a_loss_in_chunks():
    block = Block(attention=GQA(heads=4, kv_heads=2), ffn=SwiGLU(hidden_dim=64))
    loss = Loss(chunk_tokens=50, z_loss_coef=0.01)
    check(Transformer(vocab_size=V, dim=64, max_seq_len=T, position=RoPE(), layers=(block,), loss=loss))


@torch.no_grad()
@pytest.mark.parametrize(("attention", "position"), [("mqa", "rope"), ("mla", "decoupled"), ("linear", "none")])
def test_a_cache_changes_nothing(attention, position):
    block = Block(attention=ATTENTIONS[attention], ffn=FFNS["fine_grained"])
    model = Transformer(
        vocab_size=V, dim=64, max_seq_len=T, position=POSITIONS[position], layers=2 * (block,)
    ).build_initialized(0)
    model = model.eval().to(DEVICE)
    tokens_BT = torch.randint(0, V, (2, 60), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    cache = model.new_cache(2)
    parts = [model(tokens_BT[:, begin:end], cache=cache) for begin, end in ((0, 50), (50, 51), (51, 60))]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens_BT), rtol=1e-3, atol=1e-3)
