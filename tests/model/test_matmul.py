"""Products of either CPU library against float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from mosaic_dist.model import Rows, matmul
from mosaic_dist.model.ffn.kernel import Layer, run_in_turn
from mosaic_dist.plan.recorder import FLOPS

SHAPES = {"rows": (5, 24), "batch": (3, 4, 24), "one row": (1, 24), "no rows": (0, 24)}


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN whatever the CPU and the size."""
    monkeypatch.setattr(matmul, "LEAST_MULTIPLICATIONS", 1)
    monkeypatch.setattr(matmul, "LEAST_OF_EXPERTS", 1)
    monkeypatch.setattr(matmul, "_onednn_is_faster", lambda: torch.backends.mkldnn.is_available())


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_float64s(shape: tuple[int, ...], turned: bool, has_bias: bool) -> None:
    x = _drawn(shape[-1], *shape[:-1]).movedim(0, -1) if turned else _drawn(*shape)
    weight = _drawn(24, 40).T if turned else _drawn(40, 24)
    factors = [x, weight, _drawn(40)][: 2 + has_bias]
    grad = _drawn(40, *shape[:-1]).movedim(0, -1) if turned else _drawn(*shape[:-1], 40)
    results = []
    for dtype, linear in ((torch.float32, matmul.linear), (torch.float64, functional.linear)):
        given = [factor.to(dtype).detach().requires_grad_() for factor in factors]
        out = linear(*given)
        # the layer is used twice, as one that recurs is
        results.append((out, *torch.autograd.grad(2 * out + linear(*given), given, grad.to(dtype))))
    for got, right in zip(*results, strict=True):
        assert got.shape == right.shape
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients(needs: tuple[bool, bool]) -> None:
    x, weight = (
        factor.requires_grad_(need) for factor, need in zip((_drawn(5, 24), _drawn(40, 24)), needs, strict=True)
    )
    out = matmul.linear(x, weight)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.sum().backward()
    assert ((x.grad is not None), (weight.grad is not None)) == needs
    with torch.no_grad():
        assert not matmul.linear(x, weight).requires_grad


@pytest.mark.parametrize("has_bias", [False, True])
def test_experts_are_float64s(has_bias: bool) -> None:
    """Of SwiGLU experts with no, one, few and many rows, each row by itself, as the formula has it."""
    counts, tokens, dim, width = [0, 1, 33, 70], 40, 24, 56
    tokens_R = torch.randint(tokens, (sum(counts),), generator=torch.Generator().manual_seed(0))
    shapes = {"gate": (4, dim, width), "up": (4, dim, width), "down": (4, width, dim)}
    drawn = [_drawn(tokens, dim), _drawn(sum(counts)), *(0.3 * _drawn(*shape) for shape in shapes.values())]
    drawn += [_drawn(4, shape[2]) for shape in shapes.values()] if has_bias else []
    direction = _drawn(dim, tokens).T

    def through_the_kernel(x: Tensor, row_weights: Tensor, *parameters: Tensor) -> Tensor:
        rows = Rows(tokens_R, row_weights, torch.empty(0), torch.tensor(counts))
        biases = parameters[3:] or [None] * 3
        gate, up, down = map(Layer, parameters[:3], biases)
        return run_in_turn(x, rows, lambda gate, up: functional.silu(gate) * up, [gate, up], down)

    def by_the_formula(x: Tensor, row_weights: Tensor, *parameters: Tensor) -> Tensor:
        out = torch.zeros(tokens, dim, dtype=x.dtype)
        experts = [e for e, count in enumerate(counts) for _ in range(count)]
        for e, token, weight in zip(experts, tokens_R.tolist(), row_weights, strict=True):
            gate, up, down = (matrix[e] for matrix in parameters[:3])
            bias = [vector[e] for vector in parameters[3:]] or [0.0] * 3
            hidden = functional.silu(x[token] @ gate + bias[0]) * (x[token] @ up + bias[1])
            out = out.index_add(0, torch.tensor([token]), (weight * (hidden @ down + bias[2]))[None])
        return out

    results = []
    for dtype, run in ((torch.float32, through_the_kernel), (torch.float64, by_the_formula)):
        given = [tensor.to(dtype).detach().requires_grad_() for tensor in drawn]
        out = run(*given)
        results.append((out, *torch.autograd.grad(out, given, direction.to(dtype))))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-3)
    assert all(not gradient[0].any() for gradient in results[0][3:])


def test_experts_have_few_numbers_of_rows() -> None:
    x, weight = _drawn(5, 24), _drawn(24, 40)
    rounded = [matmul.rounded_rows(x, weight, rows) for rows in range(1, 10_001)]
    assert all(rows <= more < rows + max(32, rows / 16 + 1) for rows, more in enumerate(rounded, 1))
    assert len(set(rounded)) <= 90
    assert matmul.rounded_rows(x.double(), weight.double(), 5) == 5


def test_same_bits_again() -> None:
    x, weight = _drawn(37, 24), _drawn(40, 24)
    assert all(torch.equal(matmul.linear(x, weight), matmul.linear(x, weight)) for _ in range(5))


def test_operations_are_counted() -> None:
    assert torch.ops.mkldnn._linear_pointwise in FLOPS  # the planner tells torch's counter
    x, weight = _drawn(3, 4, 24), _drawn(40, 24).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        matmul.linear(x.requires_grad_(), weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 12 * 24 * 40
    with FlopCounterMode(display=False) as counter:
        matmul.multiply(_drawn(5, 24), _drawn(24, 40), added_RO=_drawn(5, 40))
    assert counter.get_total_flops() == 2 * 5 * 24 * 40


def test_what_stays_with_torch() -> None:
    x, weight = _drawn(5, 24), _drawn(40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul.linear(x, weight).dtype == torch.bfloat16
    assert matmul.linear(x.to("meta"), weight.to("meta")).shape == (5, 40)
    assert matmul.linear(x.double(), weight.double()).dtype == torch.float64
    assert matmul.linear(x[0], weight).shape == (40,)
    compiled = torch.compile(matmul.linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), x @ weight.T)
