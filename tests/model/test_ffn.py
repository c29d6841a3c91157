"""Feed-forward kinds and kinds of matrices, each against a loop anyone can check."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from mosaic_dist.model import (
    GEGLU,
    GELU,
    ClampedSwiGLU,
    DenseFFN,
    GroupedLinear,
    PlainLinearKind,
    Rows,
    SwiGLU,
    TernaryLinearKind,
    pack_ternary,
    ternary,
    unpack_ternary,
)
from mosaic_dist.model.ternary import round_rows, round_weight, transform_weight
from mosaic_dist.spec import SpecError, parse

DIM, WIDTH = 6, 10


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def randomize(module: torch.nn.Module, std: float = 1.0, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return module


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


HIDDEN = {
    GELU: lambda gate, up: gelu(up),
    SwiGLU: lambda gate, up: silu(gate) * up,
    GEGLU: lambda gate, up: gelu(gate) * up,
    ClampedSwiGLU: lambda gate, up: min(gate, 7) / (1 + math.exp(-1.702 * min(gate, 7))) * (max(-7, min(up, 7)) + 1),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", HIDDEN)
def test_each_kind_is_its_formula(kind, bias):
    layer = randomize(kind(hidden_dim=WIDTH, bias=bias).build(DIM), std=3.0)
    x = torch.randn(2, 3, DIM)
    out, extras = layer(x)
    network = layer.network

    def affine(name: str, vector: list[float]) -> list[float]:
        part = getattr(network, name, None)
        if part is None:
            return [0.0] * WIDTH
        assert (part.bias is not None) == bias
        shift = part.bias.tolist() if bias else [0.0] * part.weight.shape[0]
        rows = zip(part.weight.tolist(), shift, strict=True)
        return [sum(w * v for w, v in zip(row, vector, strict=True)) + b for row, b in rows]

    for b in range(2):
        for t in range(3):
            token = x[b, t].tolist()
            gates, ups = affine("gate", token), affine("up", token)
            hidden = [HIDDEN[kind](gate, up) for gate, up in zip(gates, ups, strict=True)]
            torch.testing.assert_close(out[b, t], torch.tensor(affine("down", hidden)), rtol=1e-4, atol=1e-3)
    assert extras == {}


def test_clamped_swiglu_has_no_gradient_beyond_its_limits():
    network = ClampedSwiGLU(hidden_dim=1, limit=2.0).build_network(1, 1)
    with torch.no_grad():
        for part in (network.gate, network.up, network.down):
            part.weight.fill_(1.0)
    for value, flows in ((1.0, True), (3.0, False), (-3.0, True)):  # a gate below -limit is not clamped
        x = torch.full((1, 1), value, requires_grad=True)
        assert (grad(network(x).sum(), x)[0].abs().item() > 1e-4) == flows


def product(stack: GroupedLinear, x: Tensor, counts: list[int]) -> Tensor:
    """What a single stack of matrices gives for rows that are sorted by expert."""
    weight = stack.transform_weight()
    bias = torch.zeros(len(weight), weight.shape[2]) if stack.bias is None else stack.bias
    parts = stack.transform_input(x).split(counts)
    return torch.cat([part @ weight[e] + bias[e] for e, part in enumerate(parts)])


def in_order(counts: list[int], weights: Tensor | None = None) -> Rows:
    """Tokens that are sorted by expert already, one row each."""
    numbers = torch.arange(sum(counts))
    weights = torch.ones(len(numbers)) if weights is None else weights
    return Rows(numbers, weights, numbers[:, None], torch.tensor(counts))


@pytest.mark.parametrize("matrix", [PlainLinearKind(), TernaryLinearKind()])
@pytest.mark.parametrize("kind", HIDDEN)
def test_stacked_experts_are_single_networks(kind, matrix):
    """Values and gradients of the grouped form against one network per expert; expert 1 gets no rows."""
    spec: DenseFFN = kind(hidden_dim=WIDTH, bias=True, linear=matrix)
    stack, counts = randomize(spec.build_experts(DIM, WIDTH, 3)), [4, 0, 1]
    x = torch.randn(5, DIM, requires_grad=True)
    single_x = x.detach().clone().requires_grad_()
    expected, singles = [], []
    for expert, rows in enumerate(single_x.split(counts)):
        single = spec.build_network(DIM, WIDTH)
        with torch.no_grad():
            for name, part in single.named_children():
                part.weight.copy_(getattr(stack, name).weight[expert].T)
                part.bias.copy_(getattr(stack, name).bias[expert])
        expected.append(single(rows))
        singles.append(single)
    out = stack(x, in_order(counts))
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (torch.cat(expected) * direction).sum().backward()
    torch.testing.assert_close(x.grad, single_x.grad, rtol=1e-5, atol=1e-5)
    for name, part in stack.named_children():
        weights = torch.stack([getattr(single, name).weight.grad.T for single in singles])
        torch.testing.assert_close(part.weight.grad, weights, rtol=1e-5, atol=1e-5)
        biases = torch.stack([getattr(single, name).bias.grad for single in singles])
        torch.testing.assert_close(part.bias.grad, biases, rtol=1e-5, atol=1e-5)
        assert part.weight.grad[1].eq(0).all()
        assert part.bias.grad[1].eq(0).all()


def test_experts_without_any_row_have_zero_gradients():
    stack = randomize(SwiGLU(hidden_dim=WIDTH, bias=True, linear=TernaryLinearKind()).build_experts(DIM, WIDTH, 2))
    stack(torch.zeros(0, DIM), in_order([0, 0])).sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in stack.parameters())


# --- ternary ------------------------------------------------------------------------------------------------------


def round_clip(weight: Tensor) -> tuple[list[list[int]], float]:
    """Equations 1 to 3 of arXiv 2402.17764, in Python's floats (whose `round` is to even, too)."""
    scale = sum(abs(w) for row in weight.tolist() for w in row) / weight.numel()
    return [[max(-1, min(1, round(w / scale))) for w in row] for row in weight.tolist()], scale


def test_ternary_is_the_papers_formula_for_each_matrix():
    weight = torch.randn(3, 4, 5) * torch.tensor([0.01, 1.0, 30.0])[:, None, None]
    values, scale = ternary(weight)
    assert values.dtype == torch.int8
    assert scale.dtype == torch.float32
    for i in range(3):
        expected, expected_scale = round_clip(weight[i])
        assert values[i].tolist() == expected
        assert scale[i].item() == pytest.approx(expected_scale, rel=1e-6)
        alone = ternary(weight[i])
        assert torch.equal(alone[0], values[i])
        assert alone[1].item() == pytest.approx(scale[i].item(), rel=1e-6)


def test_half_of_the_scale_rounds_to_zero_as_in_the_formula():
    weight = torch.tensor([[0.5, -0.5], [1.5, 1.5]])  # absolute mean 1
    assert ternary(weight)[0].tolist() == round_clip(weight)[0] == [[0, 0], [1, 1]]


def test_a_matrix_of_zeros_stays_zero():
    assert round_weight(torch.zeros(2, 3, 4)).eq(0).all()
    assert round_rows(torch.zeros(2, 3)).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_effective_weight_takes_exactly_three_values_per_matrix(dtype):
    weight = (torch.randn(4, 32, 16) * 0.02).to(dtype)
    rounded = round_weight(weight)
    assert rounded.dtype == dtype
    for i in range(4):
        low, zero, high = rounded[i].unique().tolist()
        assert (low, zero) == (-high, 0.0)
        assert high == pytest.approx(weight[i].float().abs().mean().item(), rel=0.01)


def test_roundings_pass_their_gradient_straight_through():
    weight, direction = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    assert torch.equal(grad((round_weight(weight) * direction).sum(), weight)[0], direction)
    x = torch.randn(5, 4, requires_grad=True)
    normed = torch.nn.functional.rms_norm(x, (4,), eps=1e-6)
    expected = grad((normed * direction).sum(), x)[0]
    torch.testing.assert_close(grad((round_rows(x) * direction).sum(), x)[0], expected)


def test_bitlinear_is_a_loop_over_rows_and_outputs():
    """Integers times integers, and two scales: the product that an int8 kernel would make."""
    layer = randomize(TernaryLinearKind().build(7, 5, bias=True))
    x = 3 * torch.randn(4, 7)
    values, scale = round_clip(layer.weight)
    out = layer(x)
    for r in range(4):
        size = math.sqrt(sum(v * v for v in x[r].tolist()) / 7 + 1e-6)
        normed = [v / size for v in x[r].tolist()]
        step = max(abs(v) for v in normed) / 127
        whole = [round(v / step) for v in normed]
        assert max(abs(v) for v in whole) == 127
        for o in range(5):
            expected = sum(v * w for v, w in zip(whole, values[o], strict=True)) * step * scale + layer.bias[o].item()
            assert out[r, o].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bitlinear_in_half_precision_is_near_float32_with_huge_and_tiny_rows(dtype):
    layer = randomize(TernaryLinearKind().build(64, 32), std=0.02).to(dtype)
    x = torch.randn(4, 64) * torch.tensor([1e-3, 1.0, 100.0, 1e4])[:, None]
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    exact = layer.float()(x.to(dtype).float())
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (7, 3), (2, 3, 4), (64, 33)])
def test_packed_ternary_values_come_back_bit_for_bit(shape):
    values = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = pack_ternary(values)
    assert packed.dtype == torch.uint8
    assert packed.numel() == math.ceil(values.numel() / 5)
    back = unpack_ternary(packed, shape)
    assert back.dtype == torch.int8
    assert torch.equal(back, values)
    assert torch.equal(pack_ternary(back), packed)


def test_every_byte_is_its_base_3_digits():
    for byte in range(243):
        values = unpack_ternary(torch.tensor([byte], dtype=torch.uint8), (5,))
        assert sum((value + 1) * 3**i for i, value in enumerate(values.tolist())) == byte
        assert pack_ternary(values).item() == byte


def test_a_packed_layer_gives_the_same_output():
    layer = randomize(TernaryLinearKind().build_stack(3, 8, 5, bias=True), std=0.02)
    values, scale = ternary(layer.weight)
    x, counts = torch.randn(6, 8), [1, 2, 3]
    before = product(layer, x, counts)
    back = transform_weight(unpack_ternary(pack_ternary(values), values.shape), scale, torch.float32)
    rows = [c @ back[i] + layer.bias[i] for i, c in enumerate(round_rows(x).split(counts))]
    assert torch.equal(torch.cat(rows), before)


def test_what_is_not_ternary_is_refused():
    with pytest.raises(ValueError, match="values from -1 to 2 are not ternary"):
        pack_ternary(torch.tensor([-1, 0, 2], dtype=torch.int8))
    with pytest.raises(ValueError, match="byte 243 is not"):
        unpack_ternary(torch.tensor([243], dtype=torch.uint8), (5,))
    with pytest.raises(ValueError, match=r"\[1\] is not a packing of 6 ternary values"):
        unpack_ternary(torch.tensor([0], dtype=torch.uint8), (6,))
    with pytest.raises(ValueError, match="int8"):
        unpack_ternary(torch.tensor([0], dtype=torch.int8), (5,))


def test_matrices_and_limits_are_chosen_by_name():
    spec = parse(DenseFFN, {"type": "clamped_swiglu", "hidden_dim": 4, "linear": "ternary", "limit": 5}, "ffn")
    assert spec == ClampedSwiGLU(hidden_dim=4, linear=TernaryLinearKind(), limit=5.0)
    with pytest.raises(SpecError, match=r"ffn.linear.type: no kind 'ternery' of LinearKind; did you mean 'ternary'"):
        parse(DenseFFN, {"type": "gelu", "hidden_dim": 4, "linear": "ternery"}, "ffn")
