"""Each module against a loop anyone can check."""

import math

import pytest
import torch
from torch.nn import functional

from mosaic_dist.model import (
    GELU,
    MHA,
    Block,
    Factored,
    MixtureOfExperts,
    MoE,
    NoPosition,
    SoftmaxTopK,
    SwiGLU,
    Transformer,
    Untied,
    count_parameters,
    flops_per_token,
    initialize,
)
from mosaic_dist.model.linear import GroupedLinear
from mosaic_dist.model.moe.balance import balance_loss
from mosaic_dist.model.transformer import make_attention_metadata
from mosaic_dist.spec import override
from mosaic_dist.targets import IGNORE_INDEX

SMALL = Transformer(
    vocab_size=37,
    dim=16,
    max_seq_len=12,
    embedding=Factored(rank=8),
    layers=2 * (Block(attention=MHA(heads=4), ffn=MoE(expert=SwiGLU(hidden_dim=32), split=4, experts=4, top_k=2)),),
)


def tokens(batch: int, length: int, vocab: int = 37) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(0))


def test_attention_is_the_loop_over_heads_and_tokens():
    dim, heads, T = 12, 3, 5
    layer = MHA(heads=heads, bias=True).build(dim, NoPosition())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, T, dim)
    q, k, v = (functional.linear(x, w.weight, w.bias) for w in (layer.query, layer.key, layer.value))
    expected = torch.zeros(2, T, dim)
    width = dim // heads
    for b in range(2):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            for t in range(T):
                scores = torch.stack([q[b, t, part] @ k[b, s, part] / math.sqrt(width) for s in range(t + 1)])
                expected[b, t, part] = (scores.softmax(0)[:, None] * v[b, : t + 1, part]).sum(0)
    expected = functional.linear(expected, layer.output.weight, layer.output.bias)
    metadata = make_attention_metadata(torch.zeros(2, T), None)
    torch.testing.assert_close(layer(x, metadata), expected, rtol=1e-5, atol=1e-5)


def test_explicit_attention_equals_sdpa_in_values_and_gradients():
    fused = SMALL.build_initialized(0)
    explicit = override(SMALL, {"layers.attention.kernel": "explicit"}).build_initialized(0)
    x = tokens(2, 13)
    losses = []
    for model in (fused, explicit):
        parts = model(x[:, :-1], x[:, 1:])
        (parts.cross_entropy_sum + parts.auxiliary).backward()
        losses.append(parts.cross_entropy_sum)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for one, other in zip(fused.parameters(), explicit.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_no_token_sees_the_future():
    model = SMALL.build_initialized(0)
    x = tokens(1, 12)
    changed = x.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 37
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mixture_is_the_loop_over_tokens(top_k, normalize):
    spec = MoE(
        expert=SwiGLU(hidden_dim=32),
        split=4,
        experts=4,
        top_k=top_k,
        router=SoftmaxTopK(normalize=normalize),
        aux_loss_coef=0.5,
    )
    layer = spec.build(16)
    assert isinstance(layer, MixtureOfExperts)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 7, 16)
    out, extras = layer(x)
    expected, counts, mean = torch.zeros(21, 16), torch.zeros(4), torch.zeros(4)
    for s, token in enumerate(x.reshape(-1, 16)):
        probs = (layer.router.weight @ token).softmax(0)
        mean += probs / 21
        chosen = sorted(range(4), key=lambda e: -probs[e].item())[:top_k]
        total = sum(probs[e] for e in chosen) if normalize else 1.0
        for e in chosen:
            counts[e] += 1
            hidden = functional.silu(token @ layer.experts.gate.weight[e]) * (token @ layer.experts.up.weight[e])
            expected[s] += probs[e] / total * (hidden @ layer.experts.down.weight[e])
    torch.testing.assert_close(out.reshape(-1, 16), expected, rtol=1e-4, atol=1e-5)
    assert extras["expert_load"].tolist() == counts.tolist()
    balance = 0.5 * 4 * (counts / counts.sum() * mean).sum()
    torch.testing.assert_close(extras["balance_loss"], balance, rtol=1e-5, atol=1e-6)


def test_mixture_with_starved_experts_and_one_token():
    layer = MoE(expert=GELU(hidden_dim=8), experts=4, top_k=1).build(4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 1.0
    x = torch.ones(1, 1, 4, requires_grad=True)
    out, extras = layer(x)
    out.sum().backward()
    assert extras["expert_load"].tolist() == [0, 0, 1, 0]
    assert layer.experts.up.weight.grad[2].abs().sum() > 0
    assert layer.experts.up.weight.grad[[0, 1, 3]].abs().sum() == 0


def test_balance_loss_is_one_when_balanced_and_has_a_gradient():
    assert balance_loss(torch.full((8, 4), 0.25), torch.tensor([4, 4, 4, 4])).item() == pytest.approx(1.0)
    logits = torch.randn(8, 4, requires_grad=True)
    balance_loss(logits.softmax(-1), torch.tensor([16, 0, 0, 0])).backward()
    assert logits.grad[:, 0].min() > 0  # pushes the crowded expert down


def test_tied_factored_head_shares_the_table():
    model = SMALL.build_initialized(0)
    assert model.head.weight is model.embedding.weight
    x = torch.randn(1, 2, 16)
    torch.testing.assert_close(model.head(x), x @ model.head.down.weight.T @ model.embedding.weight.T)
    assert model.embedding(tokens(1, 3)).shape == (1, 3, 16)


def test_loss_is_the_sum_over_scored_tokens():
    model = SMALL.build_initialized(0)
    x = tokens(2, 6)
    targets = x[:, 1:].clone()
    targets[0, :3] = IGNORE_INDEX
    parts = model(x[:, :-1], targets)
    log_probs = model(x[:, :-1]).log_softmax(-1)
    expected = sum(-log_probs[b, t, targets[b, t]] for b in range(2) for t in range(5) if targets[b, t] >= 0)
    torch.testing.assert_close(parts.cross_entropy_sum, expected)
    assert parts.expert_load.shape == (2, 4)
    assert parts.expert_load.sum(1).tolist() == [20, 20]


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"13 tokens are more than the model's context \(12\)"):
        SMALL.build_initialized(0)(tokens(1, 13))


def test_initial_weights_belong_to_names_not_to_order():
    whole = SMALL.build_initialized(7)
    with torch.device("meta"):
        part = SMALL.build()
    for module in part.modules():
        if isinstance(module, GroupedLinear):
            module.keep_experts(2, 2)
    from mosaic_dist.model import materialize

    materialize(part, torch.device("cpu"))
    initialize(part, SMALL.init, 2, 7)
    parts = dict(part.named_parameters())
    for name, parameter in whole.named_parameters():
        expected = parameter[2:] if ".experts." in name else parameter
        assert torch.equal(parts[name], expected), name


def test_initial_weights_have_the_spread_of_gpt2():
    spec = override(SMALL, {"dim": 128, "layers.ffn.expert.hidden_dim": 512})
    model = spec.build_initialized(0)
    assert model.layers[0].attention.query.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[0].attention.output.weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
    assert model.layers[1].ffn.experts.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
    assert model.norm.weight.eq(1).all()


def test_counts_are_those_of_the_module():
    model = SMALL.build_initialized(0)
    counts = count_parameters(SMALL)
    assert counts.total == sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) // 2
    assert counts.active == counts.total - idle
    assert sum(total for total, _ in counts.components.values()) == counts.total


def test_flops_count_matrices_and_half_of_the_attention():
    dense = Transformer(
        vocab_size=10,
        dim=8,
        max_seq_len=4,
        head=Untied(),
        layers=(Block(attention=MHA(heads=2), ffn=SwiGLU(hidden_dim=16)),),
    )
    matrices = 4 * 8 * 8 + 3 * 8 * 16 + 8 * 10
    norms = 3 * 8
    assert flops_per_token(dense, 4) == 6 * (matrices + norms) + 6 * 4 * 8
