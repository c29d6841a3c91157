"""Attention in memory linear in the length against the form that writes every score out, and its memory."""

import itertools

import pytest
import torch

from mosaic_dist.model import GQA, MHA, MLA, DecoupledRoPE, RoPE
from mosaic_dist.model.attention import blocks
from mosaic_dist.model.attention.blocks import attend_visible
from mosaic_dist.model.attention.documents import SHORTEST, cut_documents
from mosaic_dist.model.attention.kernel import attend
from mosaic_dist.model.transformer import make_attention_metadata
from mosaic_dist.plan.recorder import Recorder

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def packed(B, T, ends):
    """Documents of B sequences that end before a token with this chance."""
    generator = torch.Generator().manual_seed(T)
    return (torch.rand(B, T, generator=generator) < ends).long().cumsum(1)


def check_equal(got, expected, inputs):
    torch.testing.assert_close(got, expected, **TOLERANCE)
    weights = torch.randn_like(got)
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y in (got, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max().clamp(1)))


# as many queries as keys and values, groups, values narrower and wider than keys
SHAPES = [(4, 4, 8, 8), (4, 2, 16, 16), (4, 4, 12, 8), (4, 1, 8, 16)]


@pytest.mark.parametrize(("N", "G", "H", "U"), SHAPES)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_values_and_gradients_are_those_of_a_mask(monkeypatch, N, G, H, U, sinks, documents):
    monkeypatch.setattr(blocks, "MASKED_TOKENS", 0)
    for T, window in itertools.product((1, 37, 150), (None, 1, 7, 16, 74, 75)):
        torch.manual_seed(T)
        q, k, v = (torch.randn(2, *shape, requires_grad=True) for shape in ((N, T, H), (G, T, H), (G, T, U)))
        sinks_N = torch.randn(N, requires_grad=True) if sinks else None
        metadata = make_attention_metadata(torch.zeros(2, T), packed(2, T, 0.05) if documents else None)
        got = attend_visible(q, k, v, metadata, sliding_window=window, sinks_N=sinks_N)
        visible = metadata.visible(metadata.index_T, window)
        sinks_N1 = None if sinks_N is None else sinks_N[:, None]
        expected = attend(q, k, v, visible=visible, sinks_NT=sinks_N1, kernel="explicit")
        check_equal(got, expected, [q, k, v, *([sinks_N] if sinks else [])])


MODULES = [
    (MHA(heads=4, sliding_window=16), RoPE()),
    (GQA(heads=4, kv_heads=2, sliding_window=16, attention_sinks=True), RoPE()),
    (GQA(heads=4, kv_heads=2, attention_sinks=True), RoPE()),
    (MLA(heads=4, kv_compression_dim=12, sliding_window=16), DecoupledRoPE(rope_head_dim=4)),
]


@pytest.mark.parametrize(("spec", "position"), MODULES)
@pytest.mark.parametrize("documents", [None, packed(2, 80, 0.1)])
def test_modules_take_the_same_scores_written_out_and_not(monkeypatch, spec, position, documents):
    monkeypatch.setattr(blocks, "MASKED_TOKENS", 0)
    module = spec.build(32, position)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, metadata = torch.randn(2, 80, 32, requires_grad=True), make_attention_metadata(torch.zeros(2, 80), documents)
    got = module(x, metadata)
    module.spec = type(spec)(**{**vars(spec), "kernel": "explicit"})
    check_equal(got, module(x, metadata), [x, *module.parameters()])


def peak_bytes(T, window, sinks, documents):
    q, k, v = (torch.randn(1, heads, T, 8, requires_grad=True) for heads in (2, 1, 1))
    sinks_N = torch.randn(2, requires_grad=True) if sinks else None
    with Recorder("cpu") as recorder:
        recorder.mark("attention")
        metadata = make_attention_metadata(torch.zeros(1, T), documents)
        attend_visible(q, k, v, metadata, sliding_window=window, sinks_N=sinks_N).sum().backward()
    return recorder.phases[0].peak_bytes


@pytest.mark.parametrize(("window", "sinks", "packs"), [(64, True, False), (64, True, True), (64, False, False)])
def test_memory_is_linear_in_the_length(window, sinks, packs):
    lengths = (4096, 16384)
    small, large = (peak_bytes(T, window, sinks, torch.arange(T)[None] // 512 if packs else None) for T in lengths)
    assert large < 4.1 * small
    assert large < lengths[1] ** 2 // 8  # an eighth of a mask of one byte each


@pytest.mark.parametrize(("sinks", "packs"), [(True, False), (False, True), (True, True)])
def test_whole_sequences_take_no_mask(monkeypatch, sinks, packs):
    """Without a window; what the kernel itself allocates is linear, so masks are all that could grow faster."""
    fused, masks = torch.nn.functional.scaled_dot_product_attention, []

    def noting(*heads, attn_mask, **words):
        masks.append(attn_mask)
        return fused(*heads, attn_mask=attn_mask, **words)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    small, large = (peak_bytes(T, None, sinks, torch.arange(T)[None] // 100 if packs else None) for T in (1024, 2048))
    assert masks
    assert set(masks) == {None}
    assert large < 2.1 * small


def test_documents_are_rows_of_their_own():
    generator = torch.Generator().manual_seed(0)
    documents_BT = (torch.rand(3, 700, generator=generator) < 0.01).long().cumsum(1)
    cuts = cut_documents(documents_BT)
    rows = [row for tokens_RL in cuts.tokens_RL for row in tokens_RL]
    assert {len(row) for row in rows} <= {SHORTEST, 128, 256, 512, 700}
    flat = torch.cat(rows)
    assert torch.equal(flat[cuts.places_S], torch.arange(3 * 700))  # each token is found where it was put
    ends = list(itertools.accumulate(len(row) for row in rows))
    row_of_S = torch.bucketize(cuts.places_S, torch.tensor(ends), right=True)
    names = documents_BT.flatten() + 1000 * torch.arange(3).repeat_interleave(700)
    pairs = {(int(name), int(row)) for name, row in zip(names, row_of_S, strict=True)}
    assert len(pairs) == len(rows) == len(names.unique())  # one row per document, one document per row
    assert len(flat) < 2 * 3 * 700 + SHORTEST * len(rows)


def test_a_document_as_long_as_a_power_of_two_fills_its_row():
    cuts = cut_documents(torch.tensor([128 * [0] + 129 * [1] + 255 * [2]]))
    assert [tuple(tokens_RL.shape) for tokens_RL in cuts.tokens_RL] == [(1, 128), (2, 256)]
