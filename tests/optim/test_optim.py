"""Schedules against their formulas, parameter groups against a list anyone can read."""

import math

import pytest
import torch

from mosaic_dist.model import (
    GELU,
    MHA,
    Block,
    Factored,
    LayerNorm,
    MoE,
    NormalizedBlock,
    SwiGLU,
    Transformer,
    UnitLinearKind,
    Untied,
)
from mosaic_dist.optim import AdamW, Constant, Cosine, parameter_groups


def test_cosine_starts_after_its_warmup_and_ends_at_its_floor():
    schedule = Cosine(warmup_steps=10, min_lr_ratio=0.1)
    factors = [schedule.factor(step, 110) for step in range(111)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.55)  # half way between 1 and 0.1
    assert factors[110] == pytest.approx(0.1)
    assert factors[35] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_constant():
    assert [Constant(warmup_steps=1).factor(step, 5) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_tables_gains_and_biases_do_not_decay():
    spec = Transformer(
        vocab_size=16,
        dim=8,
        max_seq_len=4,
        embedding=Factored(rank=4),
        norm=LayerNorm(),
        layers=(
            Block(attention=MHA(heads=2, bias=True), ffn=GELU(hidden_dim=8)),
            Block(attention=MHA(heads=2), ffn=MoE(expert=SwiGLU(hidden_dim=8), experts=2)),
        ),
    )
    model = spec.build_initialized(0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay, no_decay = parameter_groups(model, 0.3)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.3, 0.0)
    assert {names[p] for p in no_decay["params"]} == {
        "embedding.weight",
        "position.weight",
        *(f"layers.0.attention.{part}.bias" for part in ("query", "key", "value", "output")),
        *(
            f"layers.{i}.{norm}.{part}"
            for i in (0, 1)
            for norm in ("attention_norm", "ffn_norm")
            for part in ("weight", "bias")
        ),
        "norm.weight",
        "norm.bias",
    }
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)


def test_the_scales_of_stacked_experts_do_not_decay():
    expert = SwiGLU(hidden_dim=8, linear=UnitLinearKind())
    block = NormalizedBlock(attention=MHA(heads=2), ffn=MoE(expert=expert, experts=2))
    model = Transformer(vocab_size=16, dim=8, max_seq_len=4, layers=(block,)).build_initialized(0)
    stacked = model.layers[0].ffn.experts.up
    decay, no_decay = ({id(p) for p in group["params"]} for group in parameter_groups(model, 0.1))
    assert stacked.scale.shape == (2, 8)
    assert id(stacked.scale) in no_decay
    assert id(stacked.weight) in decay


def test_an_untied_head_decays():
    spec = Transformer(
        vocab_size=16,
        dim=8,
        max_seq_len=4,
        head=Untied(),
        layers=(Block(attention=MHA(heads=2), ffn=GELU(hidden_dim=8)),),
    )
    model = spec.build_initialized(0)
    decay = parameter_groups(model, 0.1)[0]
    assert any(parameter is model.head.weight for parameter in decay["params"])


def test_adamw_makes_the_textbook_update():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    spec = AdamW(learning_rate=0.1, weight_decay=0.5, beta1=0.9, beta2=0.99, eps=1e-8)
    optimizer = spec.build([{"name": "decay", "params": [weight], "weight_decay": 0.5}])
    assert optimizer.defaults["fused"]  # one kernel per group of parameters, on every device
    expected, m, v = weight.detach().double().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for t in range(1, 4):
        gradient = torch.tensor([0.3, -1.0]) * t
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        expected -= 0.1 * 0.5 * expected
        expected -= 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-6)
