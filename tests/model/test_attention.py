"""Attentions and positions against loops, published numbers and other people's code."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mosaic_dist.model import (
    GQA,
    MHA,
    MLA,
    MQA,
    ALiBi,
    DecoupledRoPE,
    LinearAttention,
    LinearScaling,
    Llama3Scaling,
    NoPosition,
    RoPE,
    YaRN,
)
from mosaic_dist.model.attention.kernel import attend
from mosaic_dist.model.position.alibi import slopes
from mosaic_dist.model.transformer import make_attention_metadata, positions_in_documents
from mosaic_dist.spec import SpecError

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 7, 7, 7]])


def random_module(spec, position, dim=16):
    torch.manual_seed(0)
    module = spec.build(dim, position)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def loop(q, k, v, sees, bias=None, sinks=None, logit_softcap=None):
    """Attention one score at a time: q [B,N,T,H], k and v [B,N,T,*], `sees(b, t, s)`."""
    B, N, T, H = q.shape
    out = torch.zeros(B, N, T, v.shape[-1])
    for b in range(B):
        for n in range(N):
            for t in range(T):
                keys = [s for s in range(t + 1) if sees(b, t, s)]
                scores = torch.stack([q[b, n, t] @ k[b, n, s] / math.sqrt(H) for s in keys])
                if logit_softcap:
                    scores = logit_softcap * torch.tanh(scores / logit_softcap)
                if bias is not None:
                    scores = scores + torch.stack([bias[n] * (t - s) for s in keys])
                if sinks is not None:
                    scores = torch.cat([scores, sinks[n : n + 1]])
                weights = scores.softmax(0)[: len(keys)]
                out[b, n, t] = sum(w * v[b, n, s] for w, s in zip(weights, keys, strict=True))
    return out


@pytest.mark.parametrize("kernel", ["sdpa", "explicit"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize(
    ("kv_heads", "window", "sinks"), [(4, None, False), (2, 3, False), (1, None, True), (2, 4, True)]
)
def test_grouped_heads_windows_sinks_and_documents(kernel, documents, kv_heads, window, sinks):
    spec = GQA(heads=4, kv_heads=kv_heads, sliding_window=window, attention_sinks=sinks, kernel=kernel)
    module = random_module(spec, NoPosition())
    x = torch.randn(2, 9, 16, requires_grad=True)
    metadata = make_attention_metadata(torch.zeros(2, 9), documents)
    got = module(x, metadata)

    q = module.query(x).unflatten(-1, (4, 4)).transpose(1, 2)
    k, v = (layer(x).unflatten(-1, (kv_heads, 4)).transpose(1, 2) for layer in (module.key, module.value))
    k, v = (y[:, [n * kv_heads // 4 for n in range(4)]] for y in (k, v))

    def sees(b, t, s):
        return (window is None or t - s < window) and (documents is None or documents[b, t] == documents[b, s])

    expected = module.output(loop(q, k, v, sees, sinks=module.sinks).transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    inputs = [x, *module.parameters()]
    gradients = [torch.autograd.grad(y.square().sum(), inputs, retain_graph=True) for y in (got, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("width", "seen"), [(4, 8), (7, 8), (64, 72)])
def test_heads_with_a_sink_are_as_wide_as_fused_kernels_want(monkeypatch, width, seen):
    fused, widths = torch.nn.functional.scaled_dot_product_attention, []

    def noting(q, k, v, **words):
        widths.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        return fused(q, k, v, **words)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    q, k, v = (torch.randn(2, heads, 5, width) for heads in (4, 2, 2))
    sinks = torch.randn(4)
    got = attend(q, k, v, visible=None, sinks_NT=sinks[:, None])
    torch.testing.assert_close(got, attend(q, k, v, visible=None, sinks_NT=sinks[:, None], kernel="explicit"))
    assert widths == [(seen, seen, seen)]


def test_soft_cap():
    q, k, v = (torch.randn(1, 2, 5, 4) * 4 for _ in range(3))
    got = attend(q, k, v, visible=None, logit_softcap=2.0, kernel="explicit")
    torch.testing.assert_close(got, loop(q, k, v, lambda *_: True, logit_softcap=2.0), rtol=1e-4, atol=1e-5)
    with pytest.raises(SpecError, match="use kernel 'explicit'"):
        MHA(heads=2, logit_softcap=2.0)


@pytest.mark.parametrize("kernel", ["sdpa", "explicit"])
def test_alibi_is_a_penalty_on_distance(kernel):
    module = random_module(MHA(heads=4, kernel=kernel), ALiBi())
    x = torch.randn(1, 6, 16)
    q, k, v = (layer(x).unflatten(-1, (4, 4)).transpose(1, 2) for layer in (module.query, module.key, module.value))
    bias = torch.tensor([-(2.0 ** (-2 * (n + 1))) for n in range(4)])
    expected = module.output(loop(q, k, v, lambda *_: True, bias=bias).transpose(1, 2).flatten(2))
    torch.testing.assert_close(
        module(x, make_attention_metadata(torch.zeros(1, 6), None)), expected, rtol=1e-4, atol=1e-5
    )


def test_alibi_slopes_of_the_paper():
    assert slopes(8) == [1 / 2**i for i in range(1, 9)]
    assert slopes(12)[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


def test_qk_norm_makes_scores_independent_of_the_scale_of_queries():
    module = random_module(MQA(heads=4, qk_norm=True), NoPosition())
    x, metadata = torch.randn(1, 5, 16), make_attention_metadata(torch.zeros(1, 5), None)
    before = module(x, metadata)
    with torch.no_grad():
        module.query.weight *= 7.0
        module.key.weight *= 0.2
    torch.testing.assert_close(module(x, metadata), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("q_compression_dim", [None, 6])
@pytest.mark.parametrize("position", [DecoupledRoPE(rope_head_dim=4), NoPosition()])
def test_latent_attention_is_its_formula(position, q_compression_dim):
    spec = MLA(heads=2, kv_compression_dim=6, q_compression_dim=q_compression_dim, head_dim=8, v_head_dim=5)
    module = random_module(spec, position)
    R = 4 if isinstance(position, DecoupledRoPE) else 0
    x = torch.randn(2, 7, 16)

    def rms(y, norm):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    def turn(y, t):  # [.., R]: pairs (i, i + R/2) turned by t * base^(-2i/R)
        first, second = y[..., : R // 2], y[..., R // 2 :]
        angle = torch.tensor([t * 10_000 ** (-2 * i / R) for i in range(R // 2)])
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    source = x if q_compression_dim is None else rms(x @ module.query_down.weight.T, module.query_norm)
    q = (source @ module.query.weight.T).view(2, 7, 2, 8 + R)
    down = x @ module.kv_down.weight.T
    latent, key_rope = rms(down[..., :6], module.kv_norm), down[..., 6:]
    up = (latent @ module.kv_up.weight.T).view(2, 7, 2, 13)
    k, v = up[..., :8], up[..., 8:]
    if R:
        q = torch.stack([torch.cat([q[:, t, :, :8], turn(q[:, t, :, 8:], t)], -1) for t in range(7)], 1)
        turned = torch.stack([turn(key_rope[:, t], t) for t in range(7)], 1)
        k = torch.cat([k, turned[:, :, None].expand(-1, -1, 2, -1)], -1)
    expected = loop(*(y.transpose(1, 2) for y in (q, k, v)), lambda *_: True)
    expected = expected.transpose(1, 2).flatten(2) @ module.output.weight.T
    torch.testing.assert_close(
        module(x, make_attention_metadata(torch.zeros(2, 7), None)), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("chunk", [1, 2, 4, 64])
def test_linear_attention_is_its_sum(chunk, documents):
    module = random_module(LinearAttention(heads=2, chunk=chunk), RoPE())
    x, metadata = torch.randn(2, 9, 16), make_attention_metadata(torch.zeros(2, 9), documents)
    q, k, v = (layer(x).unflatten(-1, (2, 8)) for layer in (module.query, module.key, module.value))
    q, k = (torch.nn.functional.elu(module.position.rotate(y, metadata.positions_BT)) + 1 for y in (q, k))
    expected = torch.zeros(2, 9, 2, 8)
    for b in range(2):
        for t in range(9):
            keys = [s for s in range(t + 1) if documents is None or documents[b, s] == documents[b, t]]
            for n in range(2):
                weights = torch.stack([q[b, t, n] @ k[b, s, n] for s in keys])
                expected[b, t, n] = sum(w * v[b, s, n] for w, s in zip(weights, keys, strict=True)) / weights.sum()
    torch.testing.assert_close(module(x, metadata), module.output(expected.flatten(2)), rtol=1e-4, atol=1e-4)


def test_rotary_scores_depend_on_distance_only():
    rotation = RoPE().for_heads(1, 8)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(t, s):
        at = (rotation.rotate(x, torch.tensor([[p]])) for x, p in ((q, t), (k, s)))
        return torch.sum(next(at) * next(at)).item()

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (LinearScaling(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            YaRN(factor=32.0, original_max_seq_len=4096, truncate=False),
            {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
             "beta_slow": 1.0, "truncate": False},
        ),
        (
            YaRN(factor=8.0, original_max_seq_len=2048),
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048},
        ),
        (
            Llama3Scaling(factor=8.0),
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0},
        ),
    ],
)  # fmt: skip
def test_scaled_frequencies_are_those_of_hugging_face(ours, theirs):
    config = LlamaConfig(
        rope_theta=150_000.0, head_dim=64, hidden_size=512, num_attention_heads=8, rope_scaling=theirs,
        max_position_embeddings=131_072,
    )  # fmt: skip
    expected, magnitude = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, torch.device("cpu"))
    rotation = RoPE(theta=150_000.0, scaling=ours).for_heads(8, 64)
    torch.testing.assert_close(torch.tensor(rotation.frequencies), expected, rtol=1e-5, atol=1e-9)
    assert rotation.magnitude == pytest.approx(magnitude)


def test_positions_begin_anew_in_each_document():
    assert positions_in_documents(DOCUMENTS).tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5, 0, 1, 2]]


def test_a_window_keeps_its_cache_small():
    module = MHA(heads=2, sliding_window=3).build(16, NoPosition())
    assert module.new_cache(1, 100).slots == 3
