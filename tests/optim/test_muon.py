"""Muon against torch's own, the singular value decomposition, and a loop over matrices anyone can check."""

import pytest
import torch

from mosaic_dist.model import GELU, MHA, Block, Factored, Learned, MoE, SwiGLU, Transformer, UnitLinearKind, Untied
from mosaic_dist.optim import WSD, AdamW, Cosine, Muon, Optimizer, Schedule, muon
from mosaic_dist.spec import Spec, override

SHAPES = [(6, 6), (4, 10), (12, 5), (12, 5)]


def gradients(step: int, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(value) for value in gradients(100, shapes)]


def trained(optimizer: torch.optim.Optimizer, held: list[torch.nn.Parameter], steps: int = 4) -> list[torch.Tensor]:
    """The parameters after so many updates."""
    for step in range(steps):
        for parameter, gradient in zip(held, gradients(step, [tuple(p.shape) for p in held]), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in held]


def by_muon(held: list[torch.nn.Parameter], **fields: float) -> torch.optim.Optimizer:
    spec = Muon(learning_rate=0.02, **fields)
    return spec.build([{"params": held, "weight_decay": spec.weight_decay, "by_muon": True}])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it since 2.9")
def test_matrices_are_updated_as_by_torch(monkeypatch):
    """Which always iterates in bfloat16, rounding 15 products in a row to 2**-9."""
    monkeypatch.setattr(muon, "iteration_dtype", lambda device: torch.bfloat16)
    ours, theirs, start = parameters(SHAPES), parameters(SHAPES), parameters(SHAPES)
    trained(by_muon(ours, momentum=0.9, weight_decay=0.3), ours)
    trained(torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"), theirs)
    for one, other, begin in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 2**-6 * (other - begin).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay_and_singular_values_come_near_one(shape):
    (matrix,) = gradients(0, [shape])
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    turned = u.mT @ muon.orthogonalize(matrix.double()[None])[0] @ v.mT
    values = turned.diagonal()
    torch.testing.assert_close(turned, values.diag(), rtol=0, atol=1e-9)
    assert 0.6 < values.min() < values.max() < 1.25


def test_matrices_of_zeros_stay_zero():
    assert muon.orthogonalize(torch.zeros(2, 3, 4)).eq(0).all()


def test_each_matrix_of_a_stack_is_one_by_itself(monkeypatch):
    """Also where a stack is more than what is done at once."""
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 3 * 4 * 6)
    stack = parameters([(7, 4, 6)])
    single = [torch.nn.Parameter(matrix.clone()) for matrix in stack[0].detach()]
    together, alone = by_muon(stack), by_muon(single)
    for step in range(4):
        (stack[0].grad,) = gradients(step, [(7, 4, 6)])
        for parameter, gradient in zip(single, stack[0].grad, strict=True):
            parameter.grad = gradient.clone()
        together.step()
        alone.step()
    torch.testing.assert_close(stack[0].detach(), torch.stack([p.detach() for p in single]), rtol=1e-5, atol=1e-5)


def test_an_update_is_as_large_as_adamws():
    """Its root mean square is 0.2 of the learning rate, whatever the shape and the size of the gradients."""
    for shape in [(64, 64), (32, 128), (128, 32)]:
        held = parameters([shape])
        (before,) = (parameter.detach().clone() for parameter in held)
        (after,) = trained(by_muon(held, weight_decay=0.0), held, 1)
        size = (after - before).square().mean().sqrt() / 0.02
        assert 0.2 * 0.7 < size < 0.2 * 1.2


def test_matrices_of_the_blocks_go_by_muon_and_all_else_by_adamw():
    expert = SwiGLU(hidden_dim=8, bias=True, linear=UnitLinearKind())
    spec = Transformer(
        vocab_size=16,
        dim=8,
        max_seq_len=4,
        embedding=Factored(rank=4),
        position=Learned(),
        head=Untied(),
        layers=(
            Block(attention=MHA(heads=2, bias=True), ffn=GELU(hidden_dim=8)),
            Block(attention=MHA(heads=2), ffn=MoE(expert=expert, experts=2, shared_experts=1, router_bias=True)),
        ),
    )
    model = spec.build_initialized(0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = Muon(learning_rate=1e-3, weight_decay=0.3).groups(model)
    found = {group["name"]: {names[parameter] for parameter in group["params"]} for group in groups}
    attention = {f"layers.{i}.attention.{part}.weight" for i in (0, 1) for part in ("query", "key", "value", "output")}
    gates = {f"{of}.{part}.weight" for of in ("experts", "shared") for part in ("gate", "up", "down")}
    ffn = {f"layers.0.ffn.network.{part}.weight" for part in ("up", "down")}
    mixture = {f"layers.1.ffn.{name}" for name in gates | {"router.weight"}}
    assert found["matrices"] == attention | ffn | mixture
    assert found["decay"] == {"embedding.up.weight", "head.weight"}
    assert {"embedding.weight", "position.weight", "layers.1.ffn.experts.gate.scale"} < found["no_decay"]
    assert sum(map(len, found.values())) == len(names)
    assert [(group["weight_decay"], group["by_muon"]) for group in groups] == [(0.3, True), (0.3, False), (0.0, False)]


def test_all_else_is_bitwise_what_adamw_makes_of_it():
    shapes = [(4, 4), (3,), (5, 2)]
    ours, theirs = parameters(shapes), parameters(shapes)[1:]
    values = {"learning_rate": 0.02, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.3}
    groups = [{"params": ours[:1], "weight_decay": 0.3, "by_muon": True}]
    groups += [{"params": ours[1:], "weight_decay": 0.3, "by_muon": False}]
    one, other = Muon(**values).build(groups), AdamW(**values).build([{"params": theirs, "weight_decay": 0.3}])
    for step in range(4):
        of_all = gradients(step, shapes)
        for parameter, gradient in zip([*ours, *theirs], [*of_all, *of_all[1:]], strict=True):
            parameter.grad = gradient.clone()
        one.step()
        other.step()
    assert all(torch.equal(mine, its) for mine, its in zip(ours[1:], theirs, strict=True))
    assert not torch.equal(ours[0], parameters(shapes)[0])


class Choice(Spec):
    """The part of a run that this is about."""

    optimizer: Optimizer
    schedule: Schedule


def test_kinds_are_chosen_by_name_and_keep_what_they_share():
    chosen = Choice(optimizer=AdamW(learning_rate=3e-4, beta2=0.9), schedule=Cosine(warmup_steps=5))
    swapped = override(chosen, {"optimizer": "muon", "schedule": "wsd"})
    assert swapped.optimizer == Muon(learning_rate=3e-4, beta2=0.9)
    assert swapped.schedule == WSD(warmup_steps=5, min_lr_ratio=0.1)
    assert Choice.from_yaml(swapped.to_yaml()) == swapped
