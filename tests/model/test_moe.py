"""Routers and mixtures, each against a loop over tokens anyone can check."""

import math

import pytest
import torch
from torch.nn import functional

from mosaic_dist.model import (
    FFN,
    GELU,
    MHA,
    Block,
    ClampedSwiGLU,
    Counts,
    MixtureOfExperts,
    MoE,
    MoESwiGLU,
    Router,
    SigmoidTopK,
    SoftmaxTopK,
    SwiGLU,
    TernaryLinearKind,
    TopKSoftmax,
    Transformer,
    Untied,
    count_parameters,
)
from mosaic_dist.spec import SpecError, parse
from tests.model.test_ffn import in_order, product, randomize

DIM, EXPERTS, TOKENS = 6, 8, 11
ROUTERS = [
    SoftmaxTopK(),
    SoftmaxTopK(normalize=False),
    TopKSoftmax(),
    SigmoidTopK(),
    SigmoidTopK(normalize=False, scale=2.5),
    SigmoidTopK(scale=2.5, num_groups=4, topk_groups=2),
    SigmoidTopK(num_groups=8, topk_groups=4),
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def best(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def route(
    spec: Router, logits: list[float], top_k: int, correction: list[float]
) -> tuple[list[int], list[float], list[float]]:
    """Chosen experts of one token, their weights, and each expert's share for the balance loss."""
    exponentials = [math.exp(logit) for logit in logits]
    shares = [e / sum(exponentials) for e in exponentials]
    if isinstance(spec, TopKSoftmax):
        chosen = best(logits, top_k)
        return chosen, [exponentials[e] / sum(exponentials[c] for c in chosen) for e in chosen], shares
    if isinstance(spec, SoftmaxTopK):
        chosen = best(shares, top_k)
        total = sum(shares[e] for e in chosen) if spec.normalize else 1.0
        return chosen, [shares[e] / total for e in chosen], shares
    assert isinstance(spec, SigmoidTopK)
    scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    corrected = [s + c for s, c in zip(scores, correction, strict=True)]
    size = len(logits) // spec.num_groups
    groups = [corrected[g * size : (g + 1) * size] for g in range(spec.num_groups)]
    allowed = best([sum(sorted(group)[-2:]) for group in groups], spec.topk_groups)
    chosen = best([c if e // size in allowed else -math.inf for e, c in enumerate(corrected)], top_k)
    total = sum(scores[e] for e in chosen) if spec.normalize else 1.0
    return chosen, [scores[e] / total * spec.scale for e in chosen], [s / sum(scores) for s in scores]


def make(spec: MoE, std: float = 1.0) -> MixtureOfExperts:
    layer = randomize(spec.build(DIM), std)
    if hasattr(layer.router, "expert_bias"):
        layer.router.expert_bias.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("spec", ROUTERS, ids=str)
def test_a_router_is_the_loop_over_tokens(spec, top_k, bias):
    router = make(MoE(expert=GELU(hidden_dim=4), experts=EXPERTS, top_k=top_k, router=spec, router_bias=bias)).router
    x = torch.randn(TOKENS, DIM)
    _, probs, weights, experts = router(x)
    correction = getattr(router, "expert_bias", torch.zeros(EXPERTS)).tolist()
    for s in range(TOKENS):
        logits = router.weight @ x[s] + (router.bias if bias else 0)
        chosen, expected, shares = route(spec, logits.tolist(), top_k, correction)
        assert experts[s].tolist() == chosen
        assert weights[s].tolist() == pytest.approx(expected, rel=1e-5)
        assert probs[s].tolist() == pytest.approx(shares, rel=1e-5, abs=1e-7)
    assert {probs.dtype, weights.dtype} == {torch.float32}


def test_top_k_softmax_is_normalised_softmax_top_k_in_values_and_gradients():
    results = []
    for spec in (SoftmaxTopK(), TopKSoftmax()):
        layer = make(MoE(expert=SwiGLU(hidden_dim=4), experts=EXPERTS, top_k=3, router=spec, router_bias=True), std=0.5)
        out, extras = layer(torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(2)))
        (out.square().sum() + extras["balance_loss"]).backward()
        results.append([out, extras["balance_loss"], *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_routing_is_in_float32_whatever_the_weights():
    layer = make(MoE(expert=GELU(hidden_dim=4), experts=EXPERTS, router=SigmoidTopK(), router_bias=True))
    router = layer.router
    for parameter in router.parameters():  # as DeepSpeed casts: parameters, not buffers
        parameter.data = parameter.data.bfloat16()
    routing = router(torch.randn(TOKENS, DIM).bfloat16())
    assert routing.weights_SK.dtype == routing.probs_SE.dtype == router.expert_bias.dtype == torch.float32
    routing.weights_SK.square().sum().backward()
    assert router.weight.grad.dtype == torch.bfloat16


def test_the_correction_moves_choices_but_not_weights_and_gets_no_gradient():
    layer = MoE(expert=GELU(hidden_dim=4), experts=4, top_k=2, router=SigmoidTopK(normalize=False)).build(DIM)
    randomize(layer)
    x = torch.randn(TOKENS, DIM)
    scores = (x @ layer.router.weight.T).sigmoid()
    layer.router.expert_bias.copy_(torch.tensor([0.0, -10.0, 10.0, -10.0]))
    routing = layer.router(x)
    assert routing.experts_SK.tolist() == [[2, 0]] * TOKENS
    torch.testing.assert_close(routing.weights_SK, scores[:, [2, 0]])
    torch.testing.assert_close(routing.probs_SE, scores / scores.sum(-1, keepdim=True))
    assert "router.expert_bias" in layer.state_dict()
    assert "router.expert_bias" not in dict(layer.named_parameters())
    assert layer.router.expert_bias.dtype == torch.float32


def test_a_left_out_group_loses_to_negative_corrected_scores():
    """With 0 for the experts left out, as some implementations have it, they would win here."""
    layer = make(MoE(expert=GELU(hidden_dim=4), experts=4, top_k=2, router=SigmoidTopK(num_groups=2, topk_groups=1)))
    layer.router.expert_bias.copy_(torch.tensor([-5.0, -5.0, -9.0, -9.0]))
    assert layer.router(torch.randn(TOKENS, DIM)).experts_SK.max() == 1


def test_the_correction_has_zeros_on_a_model_from_the_meta_device():
    with torch.device("meta"):
        layer = MoE(expert=GELU(hidden_dim=4), experts=4, router=SigmoidTopK()).build(DIM)
    assert layer.router.weight.is_meta
    assert layer.router.expert_bias.tolist() == [0.0] * 4


@pytest.mark.parametrize("matrix", ["plain", "ternary"])
@pytest.mark.parametrize("kind", ["gelu", "swiglu", "geglu", "clamped_swiglu"])
@pytest.mark.parametrize("router", [TopKSoftmax(), SigmoidTopK(num_groups=2, topk_groups=1, scale=2.5)], ids=str)
def test_a_mixture_is_the_loop_over_tokens_in_values_and_gradients(router, kind, matrix):
    """Experts as single networks, one call per token and choice; shared experts as one more network."""
    expert = parse(FFN, {"type": kind, "hidden_dim": 12, "bias": True, "linear": matrix}, "")
    spec = MoE(
        expert=expert,
        split=2,
        experts=4,
        top_k=2,
        shared_experts=2,
        router=router,
        router_bias=True,
        aux_loss_coef=0.5,
    )
    layer = make(spec)
    x = torch.randn(3, 5, DIM, requires_grad=True)
    out, extras = layer(x)
    direction = torch.randn_like(out)
    found = torch.autograd.grad((out * direction).sum() + extras["balance_loss"], [x, *layer.parameters()])

    _, probs, weights, experts = layer.router(x.flatten(0, 1))
    expected, counts = [], [0] * 4
    for s, token in enumerate(x.flatten(0, 1)):
        total = layer.shared(token)
        for k, e in enumerate(experts[s].tolist()):
            counts[e] += 1
            rows = in_order([int(e == other) for other in range(4)])
            total = total + weights[s, k] * layer.experts(token[None], rows)[0]
        expected.append(total)
    balance = 0.5 * 4 * sum(counts[e] / 30 * probs[:, e].mean() for e in range(4))
    torch.testing.assert_close(out, torch.stack(expected).view_as(out), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(extras["balance_loss"], balance)
    assert extras["expert_load"].tolist() == counts
    loss = (torch.stack(expected).view_as(out) * direction).sum() + balance
    torch.testing.assert_close(found, torch.autograd.grad(loss, [x, *layer.parameters()]), rtol=1e-3, atol=1e-3)


def test_shared_experts_are_the_sum_of_single_ones():
    layer = make(MoE(expert=SwiGLU(hidden_dim=12), split=2, experts=4, shared_experts=3))
    assert layer.shared.gate.weight.shape == (18, DIM)
    x, expected = torch.randn(5, DIM), torch.zeros(5, DIM)
    for i in range(3):
        part = slice(6 * i, 6 * (i + 1))
        hidden = functional.silu(x @ layer.shared.gate.weight[part].T) * (x @ layer.shared.up.weight[part].T)
        expected += hidden @ layer.shared.down.weight[:, part].T
    torch.testing.assert_close(layer.shared(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("matrix", ["plain", "ternary"])
@pytest.mark.parametrize("router", [SoftmaxTopK(), TopKSoftmax(), SigmoidTopK()], ids=str)
def test_all_tokens_to_one_expert_leave_zero_gradients_elsewhere(router, matrix, tokens):
    expert = parse(FFN, {"type": "clamped_swiglu", "hidden_dim": 8, "bias": True, "linear": matrix}, "")
    layer = make(MoE(expert=expert, experts=4, top_k=1, shared_experts=1, router=router, router_bias=True))
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([0.0, 0.0, 500.0, 0.0]))
        if isinstance(router, SigmoidTopK):
            layer.router.expert_bias.copy_(torch.tensor([0.0, 0.0, 500.0, 0.0]))
    out, extras = layer(torch.randn(1, tokens, DIM))
    (out.square().sum() + extras["balance_loss"]).backward()
    assert extras["expert_load"].tolist() == [0, 0, tokens, 0]
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name.startswith("experts."):
            assert parameter.grad[[0, 1, 3]].eq(0).all(), name
    assert layer.experts.up.weight.grad[2].abs().sum() > 0


def test_ternary_experts_have_three_values_each_and_scales_of_their_own():
    layer = make(MoE(expert=SwiGLU(hidden_dim=32, linear=TernaryLinearKind()), experts=3))
    with torch.no_grad():
        layer.experts.up.weight[1] *= 100
    unit_rows = torch.eye(DIM).repeat(3, 1)  # their products are the weights that the layer works with
    products = product(layer.experts.up, unit_rows, 3 * [DIM]) / math.sqrt(DIM)
    for expert, values in enumerate(products.split(DIM)):
        scale = layer.experts.up.weight[expert].abs().mean().item()
        assert values.unique().tolist() == pytest.approx([-scale, 0.0, scale], rel=1e-5)


def test_the_balance_loss_of_sigmoid_scores_is_one_when_balanced():
    layer = MoE(expert=GELU(hidden_dim=4), experts=4, top_k=1, router=SigmoidTopK(), aux_loss_coef=1.0).build(4)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4) * 5)
    layer.experts.apply(randomize)
    _, extras = layer(torch.eye(4)[None])
    assert extras["expert_load"].tolist() == [1, 1, 1, 1]
    assert extras["balance_loss"].item() == pytest.approx(1.0)


# --- specs and counts ---------------------------------------------------------------------------------------------


def test_moe_swiglu_is_short_for_a_mixture_of_swiglu():
    short = parse(FFN, {"type": "moe_swiglu", "experts": 8, "top_k": 2, "shared_experts": 1, "hidden_dim": 512}, "ffn")
    assert isinstance(short, MoESwiGLU)
    assert short.written_out() == MoE(expert=SwiGLU(hidden_dim=512), experts=8, top_k=2, shared_experts=1)
    assert parse(FFN, short.to_dict(), "") == short
    with torch.device("meta"):
        layer, long = short.build(16), short.written_out().build(16)
    assert isinstance(layer, MixtureOfExperts)
    assert isinstance(layer.spec, MoE)
    shapes = [{name: p.shape for name, p in module.named_parameters()} for module in (layer, long)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, r"ffn.top_k: 9 experts per token, but there are 8 experts"),
        ({"split": 5}, r"ffn.split: 5 must divide the expert's width \(512\)"),
        ({"shared_experts": -1}, r"ffn.shared_experts: -1 must be at least 0"),
        (
            {"router": {"type": "sigmoid_top_k", "num_groups": 3}},
            r"ffn.router.num_groups: 3 must divide the experts \(8\)",
        ),
        ({"router": {"type": "sigmoid_top_k", "topk_groups": 2}}, r"ffn.router.topk_groups: 2 groups to choose, but"),
        (
            {"router": {"type": "sigmoid_top_k", "num_groups": 8}},
            r"ffn.router.topk_groups: 1 leaves 1 experts, but top_k is 2",
        ),
        ({"router": "sigmoid"}, r"ffn.router.type: no kind 'sigmoid' of Router; did you mean 'sigmoid_top_k'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_their_path(changes, message):
    short = {"type": "moe_swiglu", "experts": 8, "hidden_dim": 512} | changes
    long = {"type": "moe", "experts": 8, "expert": {"type": "swiglu", "hidden_dim": 512}} | changes
    for data in (short, long):
        with pytest.raises(SpecError, match=message):
            parse(FFN, data, "ffn")


def counts_of(ffn: FFN, dim: int) -> Counts:
    block = Block(attention=MHA(heads=2), ffn=ffn)
    return count_parameters(Transformer(vocab_size=10, dim=dim, max_seq_len=4, head=Untied(), layers=(block,)))


def test_counts_with_shared_experts_router_bias_and_expert_biases():
    dim, width, experts, top_k, shared = 8, 12, 6, 3, 2
    spec = MoE(
        expert=ClampedSwiGLU(hidden_dim=2 * width, bias=True),
        split=2,
        experts=experts,
        top_k=top_k,
        shared_experts=shared,
        router_bias=True,
        router=SigmoidTopK(),
    )
    one = 3 * dim * width + 2 * width + dim
    always = dim * experts + experts + 3 * dim * shared * width + 2 * shared * width + dim
    assert counts_of(spec, dim).components["ffn"] == (always + experts * one, always + top_k * one)


def test_the_experts_of_the_released_gpt_oss_have_their_published_size():
    """openai/gpt-oss-20b has 20,914,757,184 parameters, 3,608,307,264 of them active (without the input table)."""
    attention = (64 + 8 + 8) * 64 * 2881 + (64 * 64 + 1) * 2880 + 64
    rest = 24 * (attention + 2 * 2880) + 2880 + 201_088 * 2880
    total, active = 20_914_757_184 - 201_088 * 2880 - rest, 3_608_307_264 - rest
    spec = MoE(
        expert=ClampedSwiGLU(hidden_dim=2880, bias=True), experts=32, top_k=4, router=TopKSoftmax(), router_bias=True
    )
    assert counts_of(spec, 2880).components["ffn"] == (total // 24, active // 24)
