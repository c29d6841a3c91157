"""The CPU's bfloat16 attention against the formula in float64."""

import math

import pytest
import torch
from torch import Tensor

from mosaic_dist.model.attention import cpu_kernel
from mosaic_dist.model.attention.kernel import attend

# batch, heads, key-value heads, tokens, width of keys, width of values
SHAPES = {
    "one token": (2, 2, 2, 1, 8, 8),
    "blocks with a rest": (1, 4, 4, 37, 8, 8),
    "grouped": (2, 6, 2, 24, 16, 16),
    "latent": (1, 3, 3, 19, 24, 16),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any CPU, in blocks of 8 queries and of one or several heads."""
    monkeypatch.setattr(cpu_kernel, "BLOCK_QUERIES", 8)
    monkeypatch.setattr(cpu_kernel, "BLOCK_SCORES", 2 * 8 * 24)
    monkeypatch.setattr(cpu_kernel, "is_avx512_cpu_with", lambda word: True)


def formula(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax attention as written in a textbook."""
    group, (T, H) = q.shape[1] // k.shape[1], q.shape[2:]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT / math.sqrt(H)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(len(q), -1, T, 1)], -1)
    return scores.softmax(-1)[..., :T] @ v


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_the_formulas(shape: tuple[int, ...], has_sinks: bool) -> None:
    B, N, G, T, H, U = shape
    torch.manual_seed(0)
    # as layers give them: tokens before heads
    drawn = [torch.randn(B, T, n, width).bfloat16().transpose(1, 2) for n, width in ((N, H), (G, H), (G, U))]
    drawn += [torch.randn(N).bfloat16()] if has_sinks else []
    direction = torch.randn(B, N, T, U).bfloat16()

    def in_our_way(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return attend(q, k, v, visible=None, sinks_NT=None if sinks is None else sinks[:, None])

    results = []
    for dtype, run in ((torch.bfloat16, in_our_way), (torch.float64, formula)):
        given = [tensor.to(dtype).detach().requires_grad_() for tensor in drawn]
        out = run(*given)
        assert dtype == torch.float64 or "Triangle" in str(_graph(out)), "another kernel served"
        results.append((out, *torch.autograd.grad(out, given, direction.to(dtype))))
    for got, right in zip(*results, strict=True):
        # eight bits of mantissa: 0.4 % of rounding in each factor and result
        assert (got.double() - right).norm() <= 0.012 * right.norm() + 1e-9


def _graph(out: Tensor) -> set[str]:
    """Names of the steps that made it."""
    found, waiting = set(), [out.grad_fn]
    while waiting:
        step = waiting.pop()
        if step is not None and str(step) not in found:
            found.add(str(step))
            waiting += [parent for parent, _ in step.next_functions]
    return found


def test_memory_is_linear_in_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of all scores is made, forward or backward."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.untyped_storage().nbytes() for t in (out,) if isinstance(t, Tensor))])
            return out

    q, k, v = (torch.randn(1, 2, 256, 8).bfloat16().requires_grad_() for _ in range(3))
    with Watch():
        attend(q, k, v, visible=None).sum().backward()
    assert 0 < largest <= max(8 * 256 * 2 * 2, 2 * 256 * 8 * 4)


@pytest.mark.parametrize(
    "change", [{"dropout": 0.1}, {"visible": torch.ones(4, 4).tril().bool()}, {"kernel": "explicit"}]
)
def test_what_stays_with_torch(monkeypatch: pytest.MonkeyPatch, change: dict) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("the CPU's kernel was asked")

    monkeypatch.setattr("mosaic_dist.model.attention.kernel.attend_triangle", refuse)
    q, k, v = (torch.randn(1, 2, 4, 8).bfloat16() for _ in range(3))
    assert attend(q, k, v, **{"visible": None, **change}).shape == (1, 2, 4, 8)
    assert attend(q.float(), k.float(), v.float(), visible=None).dtype == torch.float32
    with pytest.raises(AssertionError, match="was asked"):
        attend(q, k, v, visible=None)
