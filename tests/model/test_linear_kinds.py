"""Every attention, position, shell and block learns, and generates with a cache as without it, or says why not."""

import dataclasses
import itertools

import pytest
import torch

from mosaic_dist.model import (
    GEGLU,
    GELU,
    GQA,
    MHA,
    MLA,
    MQA,
    ALiBi,
    Block,
    ClampedSwiGLU,
    DecoupledRoPE,
    Factored,
    FactoredOutput,
    LayerNorm,
    Learned,
    LinearAttention,
    MoE,
    MoESwiGLU,
    NoPosition,
    NormalizedBlock,
    RMSNorm,
    RoPE,
    SigmoidTopK,
    Sinusoidal,
    SwiGLU,
    Table,
    TernaryLinearKind,
    Tied,
    TopKSoftmax,
    Transformer,
    UnitHead,
    UnitLinearKind,
    UnitNorm,
    Untied,
    YaRN,
)
from mosaic_dist.spec import SpecError, override

ATTENTIONS = {
    "mha": MHA(heads=4),
    "gqa": GQA(heads=4, kv_heads=2, qk_norm=True),
    "mqa": MQA(heads=4, sliding_window=5, attention_sinks=True),
    "mla": MLA(heads=4, kv_compression_dim=8, q_compression_dim=12),
    "linear": LinearAttention(heads=4, chunk=4),
}
POSITIONS = {
    "learned": Learned(),
    "sinusoidal": Sinusoidal(),
    "rope": RoPE(scaling=YaRN(factor=4.0, original_max_seq_len=8)),
    "decoupled": DecoupledRoPE(rope_head_dim=4),
    "alibi": ALiBi(),
    "none": NoPosition(),
}
REFUSED = {("linear", "alibi"), ("mla", "rope"), *((a, "decoupled") for a in ATTENTIONS if a != "mla")}
SHELLS = [
    (RMSNorm(), Tied(), Table()),
    (LayerNorm(), Untied(), Factored(rank=8)),
    (RMSNorm(), FactoredOutput(rank=8), Table()),
    (UnitNorm(), UnitHead(), Factored(rank=8)),
]
BLOCKS = {"prenorm": Block, "ngpt": NormalizedBlock}
PAIRS = list(itertools.product(ATTENTIONS, POSITIONS))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So small tensors keep several threads waiting for each other: on busy cores the tests took ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(attention: str, position: str, shell: int = 0, kind: str = "prenorm") -> Transformer:
    norm, head, embedding = SHELLS[shell]
    dense, sparse = SwiGLU(hidden_dim=24), MoE(expert=SwiGLU(hidden_dim=16), experts=4, top_k=2)
    return Transformer(
        vocab_size=23, dim=16, max_seq_len=16, embedding=embedding, norm=norm, head=head, position=POSITIONS[position],
        layers=tuple(BLOCKS[kind](attention=ATTENTIONS[attention], ffn=ffn) for ffn in (dense, sparse)),
    )  # fmt: skip


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("attention", "position"), [pair for pair in PAIRS if pair not in REFUSED])
def test_it_learns_and_its_cache_changes_nothing(attention, position, kind):
    for shell in range(len(SHELLS)):
        model = make(attention, position, shell, kind).build_initialized(0)
        tokens = torch.randint(0, 23, (3, 13), generator=torch.Generator().manual_seed(1))
        documents = torch.arange(13).div(6, rounding_mode="floor").expand(3, -1)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        losses = []
        for _ in range(3):
            parts = model(tokens[:, :-1], tokens[:, 1:], documents[:, :-1])
            loss = parts.cross_entropy_sum / 36 + parts.auxiliary
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            losses.append(loss.item())
        assert losses[2] < losses[0]
        check_cache(model, tokens, documents)
        check_cache(model, tokens, None)


FFNS = {
    "gelu": GELU(hidden_dim=24, bias=True),
    "geglu": GEGLU(hidden_dim=24),
    "clamped": ClampedSwiGLU(hidden_dim=24, bias=True),
    "ternary": SwiGLU(hidden_dim=24, linear=TernaryLinearKind()),
    "unit": ClampedSwiGLU(hidden_dim=24, bias=True, linear=UnitLinearKind()),
    "moe_ternary": MoE(expert=GELU(hidden_dim=16, linear=TernaryLinearKind()), experts=4, shared_experts=1),
    "moe_unit": MoE(expert=SwiGLU(hidden_dim=16, linear=UnitLinearKind()), experts=4, shared_experts=1),
    "fine_grained": MoE(
        expert=SwiGLU(hidden_dim=32), split=4, experts=8, top_k=3, shared_experts=1, router=TopKSoftmax()
    ),
    "grouped": MoESwiGLU(
        hidden_dim=16, experts=8, top_k=2, router=SigmoidTopK(num_groups=4, topk_groups=2), router_bias=True
    ),
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("attention", ["gqa", "linear"])
def test_every_ffn_learns_and_generates(ffn, attention, kind):
    block = BLOCKS[kind](attention=ATTENTIONS[attention], ffn=FFNS[ffn])
    check_training_and_cache(Transformer(vocab_size=23, dim=16, max_seq_len=16, position=RoPE(), layers=2 * (block,)))


MATRICES = {"ternary": TernaryLinearKind(), "unit": UnitLinearKind(), "unit_unscaled": UnitLinearKind(scaled=False)}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_takes_every_matrix(attention, matrix, kind):
    made = dataclasses.replace(ATTENTIONS[attention], linear=MATRICES[matrix])
    block = BLOCKS[kind](attention=made, ffn=SwiGLU(hidden_dim=24))
    spec = Transformer(vocab_size=23, dim=16, max_seq_len=16, layers=2 * (block,))
    names = [[name for name, _ in of.build().named_parameters() if ".scale" not in name] for of in (spec, plain(spec))]
    assert names[0] == names[1]
    check_training_and_cache(spec)


def plain(spec: Transformer) -> Transformer:
    return override(spec, {"layers.attention.linear": "plain"})


def test_blocks_of_both_kinds_go_together():
    parts = {"attention": ATTENTIONS["gqa"], "ffn": FFNS["geglu"]}
    for kinds in itertools.product(BLOCKS.values(), repeat=2):
        blocks = tuple(kind(**parts, dropout=0.1) for kind in kinds)
        check_training_and_cache(Transformer(vocab_size=23, dim=16, max_seq_len=16, position=RoPE(), layers=blocks))


def check_training_and_cache(spec: Transformer) -> None:
    """Three steps on the same tokens lower the loss; afterwards a cache changes nothing."""
    model, tokens = spec.build_initialized(0), torch.randint(0, 23, (3, 13), generator=torch.Generator().manual_seed(1))
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(3):
        parts = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        (parts.cross_entropy_sum / 36 + parts.auxiliary).backward()
        optimizer.step()
        losses.append(parts.cross_entropy_sum.item())
    assert losses[2] < losses[0]
    check_cache(model.eval(), tokens, None)


@torch.no_grad()
def check_cache(model, tokens, documents):
    """Logits of a prompt of 5, then one by one, then 3 at once, equal those of all tokens at once."""
    whole = model(tokens, documents_BT=documents)
    cache, got = model.new_cache(3), []
    for begin, end in [(0, 5), *((t, t + 1) for t in range(5, 10)), (10, 13)]:
        part = None if documents is None else documents[:, begin:end]
        got.append(model(tokens[:, begin:end], documents_BT=part, cache=cache))
    torch.testing.assert_close(torch.cat(got, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("attention", "position"), sorted(REFUSED))
def test_what_cannot_be_says_why(attention, position):
    with pytest.raises(SpecError, match="use ") as caught:
        make(attention, position)
    assert caught.value.path == "layers[0].attention"
