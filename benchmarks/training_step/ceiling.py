"""The ceiling of a step: its own dominant matrix products, and nothing else."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CEILING_SHARE, CEILING_REPEATS = 0.9, 5


class Product(NamedTuple):
    """A matrix product by its operands: sizes and strides."""

    left: tuple[tuple[int, ...], tuple[int, ...]]
    right: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def flops(self) -> int:
        """Of one."""
        (rows, inner), (_, columns) = self.left[0], self.right[0]
        return 2 * rows * inner * columns


class Products(TorchDispatchMode):
    """Counts the matrix products inside a `with` block.

    Not those of attention, nor a GPU's grouped products: the ceiling is that of plain ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, packet = torch.ops.aten, func._overloadpacket
        first = {aten.mm: 0, aten.addmm: 1, aten.addmm_: 1}.get(packet)
        if first is not None:
            self._count(*args[first : first + 2])
        elif packet is torch.ops.mkldnn._linear_pointwise:
            weight_OI = args[2 if func._overloadname == "binary" else 1]
            self._count(args[0].flatten(0, -2), weight_OI.T)
        return func(*args, **(kwargs or {}))

    def _count(self, left: Tensor, right: Tensor) -> None:
        self.found[Product((tuple(left.shape), left.stride()), (tuple(right.shape), right.stride()))] += 1


def multiplied(step: Callable[[], object]) -> Counter[Product]:
    """The products of a step, the largest that make CEILING_SHARE of their operations."""
    with Products() as products:
        step()
    return dominant(products.found)


def dominant(found: Counter[Product]) -> Counter[Product]:
    """The kinds with the most operations, until they have CEILING_SHARE of all."""
    whole = sum(product.flops * times for product, times in found.items())
    kept: Counter[Product] = Counter()
    for product, times in sorted(found.items(), key=lambda item: -item[0].flops * item[1]):
        if sum(one.flops * often for one, often in kept.items()) >= CEILING_SHARE * whole:
            break
        kept[product] = times
    return kept


def ceiling(products: Counter[Product], dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of these products alone, each as often as in a step, at their best of a few tries."""
    flops = sum(product.flops * times for product, times in products.items())
    return flops / sum(_seconds(product, dtype, device) * times for product, times in products.items())


def _seconds(product: Product, dtype: torch.dtype, device: torch.device) -> float:
    """By the faster of the libraries that torch has for it, on random numbers: constants are faster on a GPU."""
    left, right = (
        torch.empty_strided(*operand, dtype=dtype, device=device).normal_() for operand in (product.left, product.right)
    )
    libraries: list[Callable[[], Tensor]] = [lambda: torch.mm(left, right)]
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        libraries.append(lambda: onednn(left, right.T, None, "none", [], ""))

    def tries() -> Iterator[float]:
        for multiply in libraries * CEILING_REPEATS:
            started = time.perf_counter()
            multiply()
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield time.perf_counter() - started

    if device.type == "cuda":
        torch.cuda.synchronize()
    return min(tries())
