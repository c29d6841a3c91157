"""The normalised Transformer against the paper's equations (arXiv 2410.01131), a token at a time."""

import math

import pytest
import torch
from torch.nn import functional

from mosaic_dist.model import (
    MHA,
    Factored,
    MoE,
    NoPosition,
    NormalizedBlock,
    SwiGLU,
    Table,
    Transformer,
    UnitHead,
    UnitLinearKind,
    UnitNorm,
    count_parameters,
    flops_per_token,
)
from mosaic_dist.model.unit import Scale, UnitGroupedLinear, UnitLinear, unit
from mosaic_dist.spec import SpecError, override

D, HEADS, WIDTH, VOCAB, T = 12, 3, 20, 19, 6
BLOCK = NormalizedBlock(
    attention=MHA(heads=HEADS, qk_norm=True, qk_norm_eps=1e-12, linear=UnitLinearKind(scaled=False)),
    ffn=SwiGLU(hidden_dim=WIDTH, linear=UnitLinearKind()),
)
NGPT = Transformer(
    vocab_size=VOCAB, dim=D, max_seq_len=8, position=NoPosition(), norm=UnitNorm(), head=UnitHead(), layers=2 * (BLOCK,)
)  # fmt: skip
UNIT_MOE = MoE(expert=SwiGLU(hidden_dim=8, linear=UnitLinearKind()), experts=4, top_k=2, shared_experts=1)


def tokens(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, T), generator=torch.Generator().manual_seed(0))


def trained() -> torch.nn.Module:
    """A model in float64 whose scales have left their start; weights are as drawn, so of no particular length."""
    model = NGPT.build_initialized(0).double()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.mul_(1 + 0.5 * torch.rand(parameter.shape, generator=noise, dtype=torch.float64))
    return model


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def normalized_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As the paper keeps them: every vector along the model's width has length one. Rows are outputs."""
    weights = {}
    for name, parameter in model.named_parameters():
        residual = name.endswith(("output.weight", "down.weight"))
        if parameter.dim() == 2:
            weights[name] = norm(parameter.T).T if residual else norm(parameter)
    return weights


def paper_logits(model: torch.nn.Module, sequence: list[int]) -> list[torch.Tensor]:
    """Equations 1 to 23 over one sequence, from weights normalised beforehand; the logits after each token."""
    w, p = normalized_weights(model), dict(model.named_parameters())
    eigen_rate = {name: value * 0.05 * math.sqrt(D) for name, value in p.items() if name.endswith("step.weight")}
    hidden = [w["embedding.weight"][token] for token in sequence]
    H = D // HEADS
    for i in range(2):
        at = f"layers.{i}."
        q, k, v = ([w[f"{at}attention.{n}.weight"] @ h for h in hidden] for n in ("query", "key", "value"))
        s_q, s_k = p[f"{at}attention.query_norm.weight"], p[f"{at}attention.key_norm.weight"]
        after = []
        for t, h in enumerate(hidden):
            heads = []
            for head in (slice(n * H, (n + 1) * H) for n in range(HEADS)):
                scores = [math.sqrt(H) * (norm(q[t][head]) * s_q) @ (norm(k[s][head]) * s_k) for s in range(t + 1)]
                shares = torch.stack(scores).softmax(0)
                heads.append(sum(share * v[s][head] for s, share in enumerate(shares)))
            h_A = norm(w[f"{at}attention.output.weight"] @ torch.cat(heads))
            h = norm(h + eigen_rate[f"{at}attention_norm.step.weight"] * (h_A - h))
            up = p[f"{at}ffn.network.up.scale"] * (w[f"{at}ffn.network.up.weight"] @ h)
            gate = p[f"{at}ffn.network.gate.scale"] * math.sqrt(D) * (w[f"{at}ffn.network.gate.weight"] @ h)
            h_M = norm(w[f"{at}ffn.network.down.weight"] @ (up * functional.silu(gate)))
            after.append(norm(h + eigen_rate[f"{at}ffn_norm.step.weight"] * (h_M - h)))
        hidden = after
    s_z = p["head.scale.weight"] * math.sqrt(D)
    return [s_z * (w["head.weight"] @ h) for h in hidden]


@torch.no_grad()
def test_it_is_the_paper_written_out():
    model, x = trained(), tokens()
    for row, logits in zip(x.tolist(), model(x), strict=True):
        # not closer, because unit matrices round their learned scales to float32
        torch.testing.assert_close(logits, torch.stack(paper_logits(model, row)), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_hidden_states_have_length_one():
    seen, model = [], trained()
    for module in (*model.layers, model.norm):
        module.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model(tokens())
    assert len(seen) == 3
    for h_BTD in seen:
        torch.testing.assert_close(h_BTD.norm(dim=-1), torch.ones(2, T, dtype=torch.float64), rtol=1e-6, atol=0)


@torch.no_grad()
def test_the_length_of_a_unit_weight_plays_no_part():
    model, x = override(NGPT, {"layers.ffn": UNIT_MOE.to_dict()}).build_initialized(0), tokens()
    before, changed = model(x), 0
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "router" not in name and not name.endswith("scale"):
            parameter.mul_(3.0)
            changed += 1
    assert changed == 2 + 2 * (4 + 3 + 3)  # tables; attention, experts and shared expert of two blocks
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model.layers[0].ffn.experts.up.weight[:, 0].mul_(3.0)  # one component of each vector turns it
    assert not torch.allclose(model(x), before, rtol=1e-4, atol=1e-5)


def test_unit_lengths_lie_along_the_models_width():
    single, stack = UnitLinearKind().build(6, 4), UnitLinearKind().build_stack(3, 6, 4)
    single_out, stack_out = (
        UnitLinearKind().build(6, 4, residual=True),
        UnitLinearKind().build_stack(3, 6, 4, residual=True),
    )
    for layer in (single, stack, single_out, stack_out):
        assert isinstance(layer, UnitLinear | UnitGroupedLinear)
        torch.nn.init.normal_(layer.weight)
        if layer.scale is not None:
            torch.nn.init.constant_(layer.scale, 0.5)
    half = 0.5 * math.sqrt(6)
    torch.testing.assert_close(single.transform_weight().norm(dim=1), torch.full((4,), half))
    torch.testing.assert_close(stack.transform_weight().norm(dim=1), torch.full((3, 4), half))
    torch.testing.assert_close(single_out.transform_weight().norm(dim=0), torch.ones(6))
    torch.testing.assert_close(stack_out.transform_weight().norm(dim=2), torch.ones(3, 6))
    assert single_out.scale is None
    assert stack_out.scale is None


def test_a_stack_is_its_layers_one_by_one():
    stack, x = UnitLinearKind().build_stack(3, 6, 4), torch.randn(5, 6)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)
    for e, weight_IO in enumerate(stack.transform_weight()):
        layer = UnitLinearKind().build(6, 4)
        layer.load_state_dict({"weight": stack.weight[e].T, "scale": stack.scale[e]})
        torch.testing.assert_close(x @ weight_IO, layer(x))


def test_a_part_of_the_experts_has_their_scales():
    with torch.device("meta"):
        layer = UnitLinearKind().build_stack(8, 6, 4, bias=True)
    layer.keep_experts(2, 3)
    assert (layer.weight.shape, layer.scale.shape, layer.bias.shape) == ((3, 6, 4), (3, 4), (3, 4))
    assert len(list(layer.parameters(recurse=False))) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unit_vectors_of_any_dtype_and_of_zeros(dtype):
    x = torch.tensor([[3e2, 4e2], [0.0, 0.0]], dtype=dtype, requires_grad=True)  # 300**2 is infinite in float16
    y = unit(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype
    torch.testing.assert_close(y, torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=dtype))
    assert x.grad.isfinite().all()


def test_initial_values():
    wide = override(NGPT, {"dim": 192, "layers.ffn": UNIT_MOE.to_dict() | {"shared_experts": 0}})
    model = override(wide, {"layers.ffn.expert.hidden_dim": 256}).build_initialized(0)
    for module in model.modules():
        if isinstance(module, Scale):
            assert module.weight.eq(1 / math.sqrt(192)).all()
    torch.testing.assert_close(model.layers[0].ffn_norm.step(), torch.full((192,), 0.05))
    torch.testing.assert_close(model.head.scale(), torch.ones(VOCAB))
    experts = model.layers[0].ffn.experts
    assert experts.up.scale.eq(1).all()
    for lengths in (
        model.layers[0].attention.query.weight.norm(dim=1),
        model.layers[0].attention.output.weight.norm(dim=0),
        experts.gate.weight.norm(dim=1),
        experts.down.weight.norm(dim=2),
        model.head.weight.norm(dim=1),
    ):
        assert lengths.mean().item() == pytest.approx(1.0, abs=0.02)


def test_the_learned_share_of_a_step_is_never_negative():
    model = NGPT.build_initialized(0)
    x, step = tokens(), model.layers[0].attention_norm.step
    before = model(x)
    with torch.no_grad():
        step.weight.neg_()
    assert torch.equal(model(x), before)


def test_a_unit_head_shares_a_table_of_the_models_width():
    model = override(NGPT, {"head.tied": True}).build_initialized(0)
    assert model.head.weight is model.embedding.weight
    assert isinstance(NGPT.embedding, Table)
    untied = count_parameters(NGPT).total
    assert count_parameters(model.spec).total == untied - VOCAB * D == sum(p.numel() for p in model.parameters())
    with pytest.raises(SpecError, match="the embedding's table is 4 wide, the model 12; use") as caught:
        override(NGPT, {"head.tied": True, "embedding": Factored(rank=4).to_dict()}).build()
    assert caught.value.path == "head.tied"


def test_a_unit_mixture_is_counted():
    spec = override(NGPT, {"layers.ffn": UNIT_MOE.to_dict()})
    matrices, scales = 3 * D * 8, 2 * 8  # of one expert
    counts = count_parameters(spec)
    assert counts.components["ffn"] == (
        2 * (4 * D + (4 + 1) * (matrices + scales)),
        2 * (4 * D + (2 + 1) * (matrices + scales)),
    )
    assert counts.components["norm"] == (2 * 2 * D, 2 * 2 * D)
    assert counts.components["head"] == (VOCAB * D + VOCAB, VOCAB * D + VOCAB)
    scores = 2 * 6 * T * D
    assert flops_per_token(spec, T) == 6 * (counts.active - VOCAB * D) + scores
