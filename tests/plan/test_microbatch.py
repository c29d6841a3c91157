"""A micro-batch on the meta device against the same one on the CPU: bytes by torch's allocator, operations by torch."""

import dataclasses
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mosaic_dist.model import (
    GELU,
    GQA,
    MHA,
    MLA,
    ActivationCheckpointing,
    Block,
    LinearAttention,
    Loss,
    MixtureOfExperts,
    MoE,
    RoPE,
    SwiGLU,
    Transformer,
    Untied,
    apply_activation_checkpointing,
)
from mosaic_dist.plan.flops import product_flops
from mosaic_dist.plan.microbatch import SHARERS, EvenRouting, Setting, run_microbatch
from mosaic_dist.plan.recorder import Recorder
from tests.plan.measured_ranks import most_allocated

SEQUENCES, LENGTH = 2, 64
DIM, VOCAB = 64, 96
MIXTURE = MoE(expert=SwiGLU(hidden_dim=48), experts=8, top_k=2, shared_experts=1, aux_loss_coef=0.1)
small = partial(Transformer, vocab_size=VOCAB, dim=DIM, max_seq_len=LENGTH)
MODELS = {
    "dense": small(layers=3 * (Block(attention=MHA(heads=4), ffn=GELU(hidden_dim=128)),)),
    "gqa and experts": small(
        position=RoPE(), layers=3 * (Block(attention=GQA(heads=4, kv_heads=2), ffn=MIXTURE),), head=Untied()
    ),
    "window and sinks": small(
        position=RoPE(),
        layers=2 * (Block(attention=GQA(heads=4, kv_heads=2, attention_sinks=True, sliding_window=16), ffn=MIXTURE),),
    ),
    "latent": small(layers=2 * (Block(attention=MLA(heads=4, kv_compression_dim=24), ffn=SwiGLU(hidden_dim=128)),)),
    "linear": small(layers=2 * (Block(attention=LinearAttention(heads=4), ffn=SwiGLU(hidden_dim=128)),)),
    "loss in chunks": small(
        layers=2 * (Block(attention=MHA(heads=4), ffn=SwiGLU(hidden_dim=128)),),
        loss=Loss(chunk_tokens=24, z_loss_coef=0.1),
    ),
    "loss in chunks, of many words": dataclasses.replace(
        small(layers=2 * (Block(attention=MHA(heads=4), ffn=SwiGLU(hidden_dim=128)),), head=Untied()),
        vocab_size=8 * VOCAB,
        loss=Loss(chunk_tokens=40),
    ),
    "mixed": small(
        layers=2
        * (
            Block(attention=MHA(heads=4, kernel="explicit"), ffn=SwiGLU(hidden_dim=128)),
            Block(attention=MHA(heads=4), ffn=MIXTURE),
        )
    ),
}
PARTS = ("none", "full", "moe")
RELATIVE_ERROR = 1e-3
"""Of the peak: kernels take a few bytes inside an operation, in torch 2.15 at most 32."""


def setting(name: str, parts: str, chunks: int = 1) -> Setting:
    return Setting(
        MODELS[name],
        1,
        SEQUENCES,
        LENGTH,
        torch.float32,
        ActivationCheckpointing(parts=parts),
        chunks,
        attention="cpu",
        grouped=False,
    )


def real(which: Setting):
    """The model with memory, its experts evenly chosen."""
    model = which.model.build_initialized(0)
    for layer in model.modules():
        if isinstance(layer, MixtureOfExperts):
            layer.router.choose = even_choice(layer.spec.experts, layer.spec.top_k)
            layer.chunks = which.expert_chunks
    apply_activation_checkpointing(model, which.activation_checkpointing)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    return model


def even_choice(experts: int, top_k: int):
    return lambda logits_SE: torch.arange(len(logits_SE) * top_k).view(-1, top_k) % experts


def run(model, tokens_BT):
    parts = model(tokens_BT, tokens_BT)
    (parts.cross_entropy_sum + parts.auxiliary).backward()


@pytest.fixture(scope="module")
def allocated():
    """The most bytes at a time by model and recomputation, all in one profile, whose start and end take seconds."""
    tokens, marks = torch.randint(0, VOCAB, (SEQUENCES, LENGTH)), {}
    models = {(name, parts): real(setting(name, parts)) for name in MODELS for parts in PARTS}
    for model in models.values():
        run(model, tokens)  # what is kept from the first pass on, such as the rotary frequencies
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for key, model in models.items():
            with torch.profiler.record_function("/".join(key)):
                run(model, tokens)
    events = list(profile.profiler.kineto_results.events())
    for key in models:
        (span,) = [event for event in events if event.name() == "/".join(key)]
        inside = [event for event in events if span.start_ns() <= event.start_ns() <= span.end_ns()]
        marks[key] = most_allocated(inside)
    return marks


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parts", PARTS)
def test_peak_is_what_the_allocator_gave(allocated, name, parts):
    peak = run_microbatch(setting(name, parts)).peak_bytes
    blocks = MODELS[name].layers
    again = {"none": 0, "full": len(blocks), "moe": sum(isinstance(block.ffn, MoE) for block in blocks)}[parts]
    peak += again * torch.get_rng_state().nbytes  # `checkpoint` keeps it in the host's memory, which is the CPU's own
    assert peak == pytest.approx(allocated[name, parts], rel=RELATIVE_ERROR)


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts(name):
    explicit = {"kernel": "explicit"}
    blocks = tuple(
        block
        if name == "linear"
        else dataclasses.replace(block, attention=dataclasses.replace(block.attention, **explicit))
        for block in MODELS[name].layers
    )
    model = dataclasses.replace(MODELS[name], layers=blocks)
    which = dataclasses.replace(setting(name, "none"), model=model)
    also = {torch.ops.aten.addmm_: lambda _, a, b, **named: 2 * a[0] * a[1] * b[1]}  # which torch leaves out
    with FlopCounterMode(display=False, custom_mapping=also) as counter:
        run(real(which), torch.randint(0, VOCAB, (SEQUENCES, LENGTH)))
    assert run_microbatch(which).flops == counter.get_total_flops()
    if name != "linear":  # whose chunks are not whole products of queries and keys
        assert product_flops(model, LENGTH) * SEQUENCES * LENGTH == counter.get_total_flops()


def test_recomputation_adds_a_forward_pass_and_takes_memory():
    plain, full = (run_microbatch(setting("dense", parts)) for parts in ("none", "full"))
    blocks = 3 * 2 * SEQUENCES * LENGTH * (4 * DIM * DIM + 2 * DIM * 128)
    scores = 3 * 2 * 2 * SEQUENCES * LENGTH * LENGTH * DIM // 2
    assert full.flops - plain.flops in (blocks + scores, blocks + scores - 3 * 2 * SEQUENCES * LENGTH * DIM * 128)
    assert full.kept_bytes < plain.kept_bytes / 2


def test_packed_documents_take_memory_linear_in_the_length():
    model = dataclasses.replace(MODELS["dense"], max_seq_len=2048)
    of_documents = dataclasses.replace(setting("dense", "none"), model=model, documents=True)
    small, large = (run_microbatch(dataclasses.replace(of_documents, seq_len=T)).peak_bytes for T in (1024, 2048))
    assert large < 2.1 * small


@pytest.mark.parametrize(("kv_heads", "copies"), [(4, 4), (2, 4)])
def test_ranks_that_share_sequences_send_heads_and_do_their_part(kv_heads, copies):
    """Queries, keys and values there and outputs back, for each token at hand, and as much in the backward pass.

    Outputs are kept on both sides, and copies of keys and values for ranks that share them.
    """
    blocks = 2 * (Block(attention=GQA(heads=8, kv_heads=kv_heads), ffn=SwiGLU(hidden_dim=128)),)
    whole = dataclasses.replace(setting("dense", "none"), model=small(position=RoPE(), layers=blocks))
    shared = dataclasses.replace(whole, sequence_parallel=4)
    one, four = run_microbatch(whole), run_microbatch(shared)
    passes, width, tokens = 2 * len(blocks), DIM // 8, SEQUENCES * LENGTH // 4
    assert {(sent.kind, sent.group) for sent in four.sent} == {("all-to-all", SHARERS)}
    handed_over = sum(sent.bytes * times for sent, times in four.sent.items())
    assert handed_over == passes * tokens * (8 + 2 * copies + 8) * width * torch.float32.itemsize
    assert not one.sent
    assert four.flops == one.flops / 4
    more = len(blocks) * tokens * (8 + 2 * (copies - kv_heads)) * width * torch.float32.itemsize
    assert four.kept_bytes == pytest.approx(one.kept_bytes / 4 + more, rel=0.01)


def test_blocks_are_put_together_as_if_all_had_run():
    """A model of three equal blocks, against one whose blocks differ in what does not matter for memory.

    The head lets go of the weighted balance loss of every mixture that has run: of two fewer, if one stands for three.
    """
    block = MODELS["gqa and experts"].layers[0]
    unlike = tuple(
        dataclasses.replace(block, ffn=dataclasses.replace(MIXTURE, aux_loss_coef=w)) for w in (0.1, 0.2, 0.3)
    )
    same = setting("gqa and experts", "none")
    other = dataclasses.replace(same, model=dataclasses.replace(same.model, layers=unlike))
    one, three = run_microbatch(same), run_microbatch(other)
    assert (one.flops, one.sent) == (three.flops, three.sent)
    losses = 2 * torch.zeros(()).nbytes
    assert one.peak_bytes == three.peak_bytes + losses
    assert one.kept_bytes == three.kept_bytes + losses


def test_a_recorder_sees_storages_come_and_go():
    recorder = Recorder("cpu")
    with recorder:
        recorder.mark("one")
        first = torch.zeros(10)
        view = first[2:]
        second = first + 1
        assert recorder.live_bytes == 2 * first.nbytes
        recorder.note_gradient()
        third = torch.zeros(5)
        del third
        recorder.mark("two")
        del first, second
        assert recorder.live_bytes == 40  # of which the view is a part
        del view
        assert recorder.live_bytes == 0
    assert [(phase.peak_bytes, phase.change_bytes) for phase in recorder.phases] == [(100, 80), (0, -80)]
    assert recorder.phases[0].gradient_peak_bytes == 80


def test_experts_get_even_numbers_of_rows():
    seen = []

    class Noting(torch.nn.Module):
        def forward(self, x, rows, experts, overlap_fn):
            seen.append(rows.counts_E.tolist())

    layer = MIXTURE.build(DIM)
    rows = type("Rows", (), {"tokens_R": torch.arange(11), "counts_E": torch.empty(4)})
    rows._replace = lambda counts_E: type("Rows", (), {"counts_E": counts_E})
    EvenRouting(Noting())(None, rows, layer, None)
    assert seen == [[2, 3, 3, 3]]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_counts_as_its_matrix_products(device):
    """Forward the two products of the explicit form; backward its four, and the scores once more."""
    B, N, G, T, S, H = 2, 4, 2, 6, 5, 8
    q, k, v = (torch.randn(B, n, t, H, device=device, requires_grad=True) for n, t in ((N, T), (G, S), (G, S)))
    with FlopCounterMode(display=False) as counter:
        scores = q @ k.repeat_interleave(N // G, 1).mT
        (scores.softmax(-1) @ v.repeat_interleave(N // G, 1)).sum().backward()
    with Recorder(device) as recorder:
        recorder.mark("all")
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        kernel(q, k, v)[0].sum().backward()
    (phase,) = recorder.phases
    counted = sum(work.flops * times for work, times in phase.work.items())
    assert counted == counter.get_total_flops() + 2 * B * N * T * S * H
