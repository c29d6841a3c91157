"""muP: the factors of every parameter against tables written by hand, and the training against the paper's own form."""

import math
from dataclasses import replace

import pytest
import torch

from mosaic_dist.model import (
    GELU,
    GQA,
    MHA,
    MLA,
    Block,
    DecoupledRoPE,
    Factored,
    FactoredOutput,
    Init,
    LayerNorm,
    MoE,
    MuP,
    NormalizedBlock,
    RoPE,
    SwiGLU,
    Transformer,
    UnitHead,
    UnitLinearKind,
    UnitNorm,
    Untied,
)
from mosaic_dist.optim import AdamW, Muon
from mosaic_dist.spec import SpecError, override

HIDDEN, TO_FINITE, SAME = (1 / 2, 1 / 4), (1 / 4, 1 / 4), (1.0, 1.0)
"""(start, rate) of a matrix of which both sides are 4 times the base's, or the inputs only, or at most the outputs."""


def times(pair: tuple[float, float], factor: float) -> tuple[float, float]:
    """A parameter that carries a factor as well."""
    return pair[0] * factor, pair[1] * factor


def model(block: Block, base: dict[str, int], **parts) -> Transformer:
    return Transformer(
        vocab_size=48, dim=64, max_seq_len=8, layers=(block,), init=MuP(base={"dim": 16} | base), **parts
    )


GPT = model(
    Block(attention=MHA(heads=4, bias=True), ffn=GELU(hidden_dim=256, bias=True)),
    {"layers.ffn.hidden_dim": 64},
    norm=LayerNorm(),
)
MIXTURE = model(
    Block(
        attention=GQA(heads=8, kv_heads=4, head_dim=8, qk_norm=True),
        ffn=MoE(expert=SwiGLU(hidden_dim=32), experts=6, split=2, shared_experts=1, router_bias=True),
    ),
    {"layers.attention.heads": 2, "layers.attention.kv_heads": 1},
    position=RoPE(),
    head=Untied(),
)
LATENT = model(
    Block(
        attention=MLA(heads=4, kv_compression_dim=12, q_compression_dim=24, head_dim=28, v_head_dim=16),
        ffn=SwiGLU(hidden_dim=96),
    ),
    {
        "layers.attention.head_dim": 4,
        "layers.attention.v_head_dim": 4,
        "layers.attention.q_compression_dim": 6,
        "layers.ffn.hidden_dim": 24,
    },
    position=DecoupledRoPE(rope_head_dim=4),
    embedding=Factored(rank=32),
    head=FactoredOutput(rank=32),
)
GROWN_SCORES = math.sqrt((4 + 4) / (28 + 4))
"""Of `LATENT`: the rotary dimensions are part of a head, and stay."""

TABLES = {
    "gpt": (
        GPT,
        {
            "embedding.weight": SAME,
            "position.weight": SAME,
            "layers.0.attention_norm.weight": SAME,
            "layers.0.attention_norm.bias": SAME,
            "layers.0.attention.query.weight": times(HIDDEN, 1 / 2),  # heads are 4 times as wide: 1 / sqrt(4)
            "layers.0.attention.query.bias": times(SAME, 1 / 2),
            "layers.0.attention.key.weight": HIDDEN,
            "layers.0.attention.key.bias": SAME,
            "layers.0.attention.value.weight": HIDDEN,
            "layers.0.attention.value.bias": SAME,
            "layers.0.attention.output.weight": HIDDEN,
            "layers.0.attention.output.bias": SAME,
            "layers.0.ffn_norm.weight": SAME,
            "layers.0.ffn_norm.bias": SAME,
            "layers.0.ffn.network.up.weight": HIDDEN,
            "layers.0.ffn.network.up.bias": SAME,
            "layers.0.ffn.network.down.weight": HIDDEN,
            "layers.0.ffn.network.down.bias": SAME,
            "norm.weight": times(SAME, 1 / 4),  # the logits' factor
            "norm.bias": times(SAME, 1 / 4),
        },
    ),
    "mixture": (
        MIXTURE,
        {
            "embedding.weight": SAME,
            "layers.0.attention_norm.weight": SAME,
            "layers.0.attention.query.weight": HIDDEN,  # more heads, not wider ones
            "layers.0.attention.key.weight": HIDDEN,
            "layers.0.attention.value.weight": HIDDEN,
            "layers.0.attention.output.weight": HIDDEN,
            "layers.0.attention.query_norm.weight": SAME,
            "layers.0.attention.key_norm.weight": SAME,
            "layers.0.ffn_norm.weight": SAME,
            "layers.0.ffn.router.weight": TO_FINITE,
            "layers.0.ffn.router.bias": SAME,
            "layers.0.ffn.experts.gate.weight": TO_FINITE,  # fine-grained experts, as wide as the base's
            "layers.0.ffn.experts.up.weight": TO_FINITE,
            "layers.0.ffn.experts.down.weight": SAME,
            "layers.0.ffn.shared.gate.weight": TO_FINITE,
            "layers.0.ffn.shared.up.weight": TO_FINITE,
            "layers.0.ffn.shared.down.weight": SAME,
            "norm.weight": times(SAME, 1 / 4),
            "head.weight": SAME,
        },
    ),
    "latent": (
        LATENT,
        {
            "embedding.weight": SAME,
            "embedding.up.weight": SAME,
            "layers.0.attention_norm.weight": SAME,
            "layers.0.attention.query_down.weight": HIDDEN,
            "layers.0.attention.query_norm.weight": SAME,
            "layers.0.attention.query.weight": times((1 / 2, 1 / 4), GROWN_SCORES),  # 24 -> 4 * 32 of 6 -> 4 * 8
            "layers.0.attention.kv_down.weight": TO_FINITE,  # the latent and the rotary key stay
            "layers.0.attention.kv_norm.weight": SAME,
            "layers.0.attention.kv_up.weight": SAME,
            "layers.0.attention.output.weight": HIDDEN,
            "layers.0.ffn_norm.weight": SAME,
            "layers.0.ffn.network.gate.weight": HIDDEN,
            "layers.0.ffn.network.up.weight": HIDDEN,
            "layers.0.ffn.network.down.weight": HIDDEN,
            "norm.weight": SAME,  # what enters the head is `down`, which knows
            "head.down.weight": (1 / 2, 1 / 4),  # to be 1 / 4 of the base's 1 / sqrt(16), it starts at 1 / sqrt(64)
            "head.weight": SAME,
        },
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_factors_are_those_of_the_table(name):
    spec, expected = TABLES[name]
    found = {key: (factors.start, factors.rate) for key, factors in spec.width_factors().items()}
    assert found.keys() == expected.keys()
    for key, pair in expected.items():
        assert found[key] == pytest.approx(pair), key


def test_a_projection_between_different_growths_is_bounded_by_its_outputs():
    """16 -> 32 became 64 -> 64: a random matrix may be sqrt(2 / 4) times as large as one that keeps its form."""
    spec = model(Block(attention=MHA(heads=4), ffn=GELU(hidden_dim=64)), {"layers.ffn.hidden_dim": 32})
    factors = spec.width_factors()
    assert factors["layers.0.ffn.network.up.weight"][:2] == pytest.approx((math.sqrt(1 / 2 / 4), 1 / 4))
    assert factors["layers.0.ffn.network.down.weight"][:2] == pytest.approx((math.sqrt(1 / 2), 1 / 2))


def test_a_tied_factored_head_whose_rank_grows_carries_the_factor_in_its_projection():
    block = Block(attention=MHA(heads=4), ffn=GELU(hidden_dim=64))
    spec = model(block, {"layers.ffn.hidden_dim": 16, "embedding.rank": 8}, embedding=Factored(rank=32))
    factors = spec.width_factors()
    assert factors["embedding.weight"][:2] == (1.0, 1.0)
    assert factors["embedding.up.weight"][:2] == pytest.approx((1.0, 1 / 4))  # it starts at 1 / sqrt(inputs) anyway
    assert factors["head.down.weight"][:2] == pytest.approx((1 / 4, 1 / 16))
    assert factors["norm.weight"][:2] == (1.0, 1.0)


@pytest.mark.parametrize("name", TABLES)
def test_weights_start_by_the_factors_and_as_always_at_the_base_itself(name):
    spec = TABLES[name][0]
    plain = replace(spec, init=Init()).build_initialized(3)
    widened = spec.build_initialized(3)
    factors = spec.width_factors()
    for key, weight in plain.named_parameters():
        torch.testing.assert_close(dict(widened.named_parameters())[key], weight * factors[key].start)
    same = replace(spec, init=MuP(base={path: value_at(spec, path) for path in spec.init.base})).build_initialized(3)
    for key, weight in plain.named_parameters():
        assert torch.equal(dict(same.named_parameters())[key], weight), key


def value_at(spec: Transformer, path: str) -> int:
    """The field of a spec at a path."""
    found = spec
    for step in path.split("."):
        found = found[0] if isinstance(found, tuple) else found
        found = getattr(found, step)
    return found


@pytest.mark.parametrize("optimizer", [AdamW(learning_rate=0.1), Muon(learning_rate=0.1)], ids=["adamw", "muon"])
def test_groups_at_the_base_itself_are_those_without(optimizer):
    spec = replace(GPT, init=MuP(base={"dim": 64}))
    module = spec.build_initialized(0)
    assert optimizer.groups(module, spec.width_factors()) == optimizer.groups(module)
    assert {group["rate"] for group in optimizer.groups(module)} == {1.0}


def test_groups_learn_by_their_rate_and_decay_by_the_same_amount():
    module, factors = MIXTURE.build_initialized(0), MIXTURE.width_factors()
    names = {parameter: name for name, parameter in module.named_parameters()}
    for optimizer, kind in ((AdamW(learning_rate=0.1, weight_decay=0.3), 1), (Muon(learning_rate=0.1), 2)):
        groups = optimizer.groups(module, factors)
        assert len({group["name"] for group in groups}) == len(groups)
        assert sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())
        for group in groups:
            for parameter in group["params"]:
                column = kind if group.get("by_muon") else 1
                assert factors[names[parameter]][column] == group["rate"], names[parameter]
            decay = group["weight_decay"] * group["rate"]
            assert decay == 0 or decay == pytest.approx(optimizer.weight_decay)


def test_rates_of_muon_make_its_steps_as_large_as_adams_would_be():
    """Moonlight's step has the norm sqrt(longer side); wanted is sqrt(outputs / inputs), as at the base."""
    expected = {
        "layers.0.attention.output.weight": 1 / 2,  # 16 -> 16 became 64 -> 64: as before, but the step has twice
        "layers.0.ffn.router.weight": 1 / 4,  # 16 -> 6 became 64 -> 6: half of it, and the step has twice
        "layers.0.ffn.experts.up.weight": 1 / 4,  # 16 -> 16 became 64 -> 16
        "layers.0.ffn.experts.down.weight": 1.0,  # 16 -> 16 became 16 -> 64: twice, and the step has twice
    }
    factors = MIXTURE.width_factors()
    assert {name: factors[name].muon_rate for name in expected} == pytest.approx(expected)
    assert GPT.width_factors()["layers.0.attention.query.weight"].muon_rate == pytest.approx(1 / 2 / 2)


def test_training_is_that_of_the_papers_own_form():
    """Table 8 of arXiv 2203.03466, written out: factors in the forward pass, a learning rate for hidden matrices."""
    spec = replace(GPT, position=RoPE(), norm=LayerNorm(), init=replace(GPT.init, std=0.3))
    optimizer = AdamW(learning_rate=1e-2, weight_decay=0.1, eps=1e-20)
    ours = spec.build_initialized(0).double()
    theirs = replace(spec, init=Init(std=0.3)).build_initialized(0).double()
    hidden = [p for n, p in theirs.layers.named_parameters() if p.dim() == 2]
    with torch.no_grad():
        for weight in hidden:
            weight *= (1 / 4) ** 0.5
    theirs.layers[0].attention.query.register_forward_hook(lambda _module, _inputs, out: out / 4**0.5)
    theirs.head.register_forward_hook(lambda _module, _inputs, out: out / 4)
    slow = {id(p) for p in hidden}
    others = [p for p in theirs.parameters() if id(p) not in slow]
    reference = torch.optim.AdamW(
        [
            {"params": hidden, "lr": 1e-2 / 4, "weight_decay": 0.1 * 4},
            {
                "params": others,
                "lr": 1e-2,
                "weight_decay": 0.0,
            },  # vectors, and the table of both ends
        ],
        betas=(optimizer.beta1, optimizer.beta2),
        eps=1e-20,
    )
    built = optimizer.build(optimizer.groups(ours, spec.width_factors()))
    for group in built.param_groups:
        group["lr"] = optimizer.learning_rate * group["rate"]
    tokens = torch.randint(0, 48, (4, 9), generator=torch.Generator().manual_seed(0))
    first = ours(tokens[:, :-1]).detach()
    for _ in range(5):
        for module, stepper in ((ours, built), (theirs, reference)):
            (module(tokens[:, :-1], tokens[:, 1:]).cross_entropy_sum / 32).backward()
            stepper.step()
            stepper.zero_grad()
        mine, its = ours(tokens[:, :-1]), theirs(tokens[:, :-1])
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)
    assert (mine - first).abs().mean() > 0.1 * first.abs().mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": {"type": "mup", "base": {"dimm": 16}}}, r"init\.base\.dimm: .* did you mean 'dim'"),
        ({"init": {"type": "mup", "base": {"dim": 18}}}, "4 heads must divide the model's width"),
        (
            {"init": {"type": "mup", "base": {"vocab_size": 24}}},
            r"widths may differ .* embedding\.weight is \[48, 64\]",
        ),
        ({"init": {"type": "mup", "base": {"max_seq_len": 4}}}, r"position\.weight is \[8, 64\], and \[4, 64\] there"),
        (
            {
                "layers.ffn": {"type": "moe_swiglu", "experts": 4, "hidden_dim": 8},
                "init.base": {"layers.ffn.experts": 2},
            },
            r"only widths may differ .*ffn\.(router|experts)",
        ),
        (
            {"embedding": {"type": "factored", "rank": 16}, "init.base": {"dim": 16}},
            r"embedding\.up\.weight is in one of them only",
        ),
    ],
)
def test_a_base_that_differs_in_more_than_widths_is_refused(changes, message):
    with pytest.raises(SpecError, match=message):
        override(GPT, changes).width_factors()


@pytest.mark.parametrize(
    "parts",
    [
        {"layers": (NormalizedBlock(attention=MHA(heads=4), ffn=SwiGLU(hidden_dim=8)),)},
        {"layers": (Block(attention=MHA(heads=4, linear=UnitLinearKind(scaled=False)), ffn=SwiGLU(hidden_dim=8)),)},
        {
            "layers": (
                Block(attention=MHA(heads=4), ffn=MoE(expert=SwiGLU(hidden_dim=8, linear=UnitLinearKind()), experts=2)),
            )
        },
        {"norm": UnitNorm()},
        {"head": UnitHead()},
    ],
    ids=["block", "matrix", "experts", "norm", "head"],
)
def test_vectors_of_length_one_are_refused(parts):
    with pytest.raises(SpecError, match="init: 'mup' with vectors of length one"):
        replace(GPT, init=MuP(base={"dim": 16}), **parts).width_factors()
