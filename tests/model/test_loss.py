"""The loss in chunks against plain autograd over all logits in float64: every head, dtype and mask."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mosaic_dist.model import (
    GELU,
    MHA,
    ActivationCheckpointing,
    Block,
    Embedding,
    Factored,
    FactoredOutput,
    Head,
    Loss,
    MoE,
    SwiGLU,
    Table,
    Tied,
    Transformer,
    UnitHead,
    Untied,
    apply_activation_checkpointing,
)
from mosaic_dist.model.loss import AUTO_LOGITS, ROUND_TOKENS
from mosaic_dist.targets import IGNORE_INDEX

B, T, D, VOCAB, CHUNK = 2, 23, 16, 61, 5
HEADS: dict[str, tuple[Embedding, Head]] = {
    "tied": (Table(), Tied()),
    "tied, factored table": (Factored(rank=8), Tied()),
    "linear": (Table(), Untied()),
    "factored": (Table(), FactoredOutput(rank=8)),
    "unit": (Table(), UnitHead()),
    "unit, tied": (Table(), UnitHead(tied=True)),
}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""The most that rounding to a dtype is off by, relative."""
LIMIT = 10
"""Roundings in a row, of the loss and of the norm of a gradient; the logits are up to 20, and theirs are of that."""


def make(name: str, dtype: torch.dtype = torch.float32):
    """A head with its embedding, whose logits are up to 10 or so."""
    embedding, head = HEADS[name]
    made = embedding.build(VOCAB, D)
    module = torch.nn.ModuleDict({"embedding": made, "head": head.build(VOCAB, D, made)})
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return module


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and targets of which some are not scored: all of the second and third chunk."""
    generator = torch.Generator().manual_seed(1)
    x_BTD = torch.randn(B, T, D, generator=generator).to(dtype).requires_grad_()
    targets_BT = torch.randint(0, VOCAB, (B, T), generator=generator)
    targets_BT[0, CHUNK : 3 * CHUNK] = IGNORE_INDEX
    targets_BT[1, ::4] = IGNORE_INDEX
    return x_BTD, targets_BT


def exact(module, x_BTD, targets_BT, z_loss_coef: float):
    """Loss, z-loss and gradients in float64, token by token from the logits."""
    module, x_BTD = module.double(), x_BTD.detach().double().requires_grad_()
    loss = z_loss = torch.zeros((), dtype=torch.float64)
    for logits_V, target in zip(module["head"](x_BTD).flatten(0, 1), targets_BT.flatten(), strict=True):
        if target != IGNORE_INDEX:
            log_z = logits_V.exp().sum().log()
            z_loss = z_loss + z_loss_coef * log_z**2
            loss = loss + log_z - logits_V[target] + z_loss_coef * log_z**2
    loss.backward()
    return loss, z_loss, gradients(module, x_BTD)


def gradients(module, x_BTD) -> dict[str, torch.Tensor]:
    named = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return named | {"x": x_BTD.grad}


@pytest.mark.parametrize("z_loss_coef", [0.0, 0.01])
@pytest.mark.parametrize("chunk_tokens", [CHUNK, B * T])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_loss_and_gradients_are_those_of_all_logits(name, dtype, chunk_tokens, z_loss_coef):
    module, (x_BTD, targets_BT) = make(name, dtype=dtype), batch(dtype)
    scores = Loss(chunk_tokens=chunk_tokens, z_loss_coef=z_loss_coef).score(module["head"], x_BTD, targets_BT, VOCAB)
    (3 * scores.loss).backward()
    got = gradients(module, x_BTD)
    loss, z_loss, expected = exact(make(name, dtype=dtype), x_BTD, targets_BT, z_loss_coef)
    assert scores.loss.dtype == torch.float32
    torch.testing.assert_close(scores.loss.double(), loss, rtol=LIMIT * ROUNDING[dtype], atol=0.0)
    torch.testing.assert_close(scores.z_loss.double(), z_loss, rtol=LIMIT * ROUNDING[dtype], atol=0.0)
    assert not scores.z_loss.requires_grad
    assert got.keys() == expected.keys()
    for key, gradient in expected.items():
        error = (got[key].double() / 3 - gradient).norm() / gradient.norm()
        assert got[key].dtype == dtype
        assert error < LIMIT * ROUNDING[dtype], (key, error)


def test_nothing_scored_is_no_loss_and_no_gradient():
    module, (x_BTD, targets_BT) = make("linear"), batch()
    scores = Loss(chunk_tokens=CHUNK, z_loss_coef=0.1).score(
        module["head"], x_BTD, torch.full_like(targets_BT, IGNORE_INDEX), VOCAB
    )
    scores.loss.backward()
    assert scores.loss.item() == scores.z_loss.item() == 0.0
    assert not any(gradient.any() for gradient in gradients(module, x_BTD).values())


def test_without_gradients_no_product_is_made_for_them():
    module, (x_BTD, targets_BT) = make("tied"), batch()
    loss = Loss(chunk_tokens=CHUNK)
    expected = loss.score(module["head"], x_BTD, targets_BT, VOCAB)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        got = loss.score(module["head"], x_BTD, targets_BT, VOCAB)
    assert torch.equal(got.loss, expected.loss)
    assert counter.get_total_flops() == 2 * B * T * D * VOCAB


@pytest.mark.parametrize("parts", ["none", "full"])
def test_a_model_trains_the_same_in_chunks(parts):
    """A tied table has the gradients of both its uses; what runs again is not disturbed."""
    mixture = MoE(expert=SwiGLU(hidden_dim=16), experts=4, aux_loss_coef=0.1)
    block = Block(attention=MHA(heads=2), ffn=mixture), Block(attention=MHA(heads=2), ffn=GELU(hidden_dim=16))
    plain = Transformer(vocab_size=VOCAB, dim=D, max_seq_len=T, layers=block)
    found = []
    for spec in (plain, dataclasses.replace(plain, loss=Loss(chunk_tokens=CHUNK))):
        model = spec.build_initialized(0)
        apply_activation_checkpointing(model, ActivationCheckpointing(parts=parts))
        tokens_BT = torch.randint(0, VOCAB, (B, T + 1), generator=torch.Generator().manual_seed(2))
        parts_of_loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
        (parts_of_loss.cross_entropy_sum / (B * T) + parts_of_loss.auxiliary).backward()
        found.append((parts_of_loss.cross_entropy_sum, {n: p.grad for n, p in model.named_parameters()}))
    (loss, expected), (in_chunks, got) = found
    torch.testing.assert_close(in_chunks, loss, rtol=1e-6, atol=0.0)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunk_tokens", [CHUNK, B * T])
def test_the_z_loss_is_told_apart(chunk_tokens):
    spec = Transformer(
        vocab_size=VOCAB, dim=D, max_seq_len=T, layers=(Block(attention=MHA(heads=2), ffn=GELU(hidden_dim=8)),)
    )
    tokens_BT = torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(2))
    both = dataclasses.replace(spec, loss=Loss(z_loss_coef=0.5, chunk_tokens=chunk_tokens))
    plain, with_z = (model.build_initialized(0)(tokens_BT, tokens_BT) for model in (spec, both))
    torch.testing.assert_close(with_z.cross_entropy_sum, plain.cross_entropy_sum)
    logits_SV = spec.build_initialized(0)(tokens_BT).flatten(0, 1)
    torch.testing.assert_close(with_z.z_loss_sum, 0.5 * logits_SV.logsumexp(-1).square().sum())
    assert plain.z_loss_sum.item() == 0.0


def test_chunks_begin_where_logits_are_many():
    assert Loss().tokens_at_a_time(8192, 32_000) == 8192
    tokens = Loss().tokens_at_a_time(8192, 200_000)
    assert tokens % ROUND_TOKENS == 0
    assert AUTO_LOGITS - 200_000 * ROUND_TOKENS < tokens * 200_000 <= AUTO_LOGITS
    assert Loss().tokens_at_a_time(10_000, 2**40) == ROUND_TOKENS
    assert Loss(chunk_tokens=1000).tokens_at_a_time(8192, 10) == 1000
    assert Loss(chunk_tokens=1000).tokens_at_a_time(64, 200_000) == 64


@pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion("2.12"),
    reason="torch 2.11 compiles it to a wrong gradient of the weight; the package does not compile it",
)
def test_it_compiles_in_one_piece():
    module, (x_BTD, targets_BT) = make("linear"), batch()
    head, loss = module["head"], Loss(chunk_tokens=CHUNK, z_loss_coef=0.01)
    expected = loss.score(head, x_BTD, targets_BT, VOCAB)
    compiled = torch.compile(lambda x: loss.score(head, x, targets_BT, VOCAB).loss, fullgraph=True, backend="aot_eager")
    got = compiled(x_BTD)
    torch.testing.assert_close(got, expected.loss)
    (eager,) = torch.autograd.grad(expected.loss, head.weight)
    torch.testing.assert_close(torch.autograd.grad(got, head.weight)[0], eager)
