"""What operations allocate, compute and send, written down while they run, on any device, the meta device included."""

import contextlib
import dataclasses
import weakref
from collections import ChainMap, Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

aten = torch.ops.aten


def _grouped_flops(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Rows of all groups times a matrix each, or, for gradients of the matrices, the other way round."""
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # see model/matmul.py

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return 2 * x_shape.numel() * out_shape[-1]


def _attention_flops(q_BNTH: Tensor, k_BGSH: Tensor, v_BGSU: Tensor, *_: Any, **__: Any) -> int:
    """Scores and their products with the values, of all pairs of tokens, masked ones too."""
    pairs = q_BNTH.shape[:3].numel() * k_BGSH.shape[2]
    return 2 * pairs * (q_BNTH.shape[3] + v_BGSU.shape[3])


def _attention_backward_flops(_: Tensor, q_BNTH: Tensor, k_BGSH: Tensor, v_BGSU: Tensor, *__: Any, **___: Any) -> int:
    """The scores again, and four products: gradients of scores, values, queries and keys."""
    pairs = q_BNTH.shape[:3].numel() * k_BGSH.shape[2]
    return 2 * pairs * (3 * q_BNTH.shape[3] + 2 * v_BGSU.shape[3])


ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
"""Kernels of scaled_dot_product_attention. torch 2.11 refuses to count fewer heads of keys, and before 2.15 CPUs."""
FLOPS: ChainMap[Any, Any] = ChainMap(
    {
        aten._grouped_mm: _grouped_flops,
        aten.addmm_: flop_registry[aten.addmm],
        **{getattr(aten, f"_scaled_dot_product_{kernel}"): _attention_flops for kernel in ATTENTION},
        **{getattr(aten, f"_scaled_dot_product_{kernel}_backward"): _attention_backward_flops for kernel in ATTENTION},
    },
    flop_registry,
)
"""Formulas by operation: torch's, with what others register there, and of products that nobody counts."""


class Work(NamedTuple):
    """One operation: what a roofline asks of it."""

    is_product: bool
    """Whether it is a matrix product or attention, which `flops` counts; of other operations only the bytes count."""
    dtype: torch.dtype
    flops: int
    bytes: int
    """Read and written."""


class Sent(NamedTuple):
    """One collective: what a rank hands over."""

    kind: str
    bytes: int
    group: Any = None
    """As it is called; None: there is no other of this kind."""


@dataclasses.dataclass
class Phase:
    """What happened between two marks."""

    name: str
    peak_bytes: int = 0
    """The most that was allocated at a time beyond what was at the beginning."""
    change_bytes: int = 0
    """Allocated at the end, less what was at the beginning."""
    gradient_peak_bytes: int = 0
    """The most beyond what was at the beginning at a moment when a parameter's gradient is there (`note_gradient`)."""
    work: Counter[Work] = dataclasses.field(default_factory=Counter)
    sent: Counter[Sent] = dataclasses.field(default_factory=Counter)


class Recorder(TorchDispatchMode):
    """Notes every operation inside a `with` block, in phases that `mark` begins.

    Counted are the storages that are made inside the block, on the device `device_type` ("meta", "cpu"), until they are
    freed. Storages that operations only read were there before.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.phases: list[Phase] = []
        self.live_bytes = 0
        self._begin_bytes = 0
        self._known: dict[int, Any] = {}

    def mark(self, name: str) -> None:
        """End the phase at hand and begin another."""
        self._begin_bytes = self.live_bytes
        self.phases.append(Phase(name))

    def note_gradient(self) -> None:
        """A parameter's gradient has been made, and is what an engine now takes."""
        phase = self.phases[-1]
        phase.gradient_peak_bytes = max(phase.gradient_peak_bytes, self.live_bytes - self._begin_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        for tensor in given:
            self._know(tensor.untyped_storage(), 0)
        out = func(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        for tensor in made:
            if tensor.device.type == self.device_type:
                self._know(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        if not func.is_view:
            self.phases[-1].work[_work(func, args, kwargs or {}, out, given, made)] += 1
        phase = self.phases[-1]
        phase.change_bytes = self.live_bytes - self._begin_bytes
        return out

    def _know(self, storage: Any, size: int) -> None:
        """Count a storage that was not seen before, until it is freed."""
        key = storage._cdata
        if key in self._known:
            return
        phase = self.phases[-1]
        self.live_bytes += size
        phase.peak_bytes = max(phase.peak_bytes, self.live_bytes - self._begin_bytes)

        def forget() -> None:
            self.live_bytes -= size
            self.phases[-1].change_bytes = self.live_bytes - self._begin_bytes
            del self._known[key]  # the address may come again

        self._known[key] = weakref.finalize(storage, forget)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Let collectives return at once, and note them: every rank is taken to do what this one does."""
        return replaced(dist, all_to_all_single=self._all_to_all, all_reduce=self._all_reduce)

    def _all_to_all(self, out: Tensor, sent: Tensor, *words: Any, group: Any = None, async_op: bool = False) -> Any:
        self.phases[-1].sent[Sent("all-to-all", sent.nbytes, group)] += 1
        if not sent.is_meta:
            out.copy_(sent[:1].expand_as(out))  # numbers of rows: what each rank has for this one is alike
        return _Done() if async_op else None

    def _all_reduce(self, tensor: Tensor, *words: Any, group: Any = None) -> None:
        self.phases[-1].sent[Sent("all-reduce", tensor.nbytes, group)] += 1


@contextlib.contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of a module that are others for a while."""
    originals = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(owner, name, value)


class _Done:
    """A collective that has ended."""

    def wait(self) -> None:
        """Nothing to wait for."""


def _work(func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], made: list[Tensor]) -> Work:
    formula, flops = FLOPS.get(func._overloadpacket), 0
    if formula is not None:
        flops = formula(*args, **kwargs, out_val=out) // (2 if _is_triangle(func, args, kwargs) else 1)
    dtype = given[0].dtype if given else torch.float32
    return Work(formula is not None, dtype, flops, sum(tensor.nbytes for tensor in (*given, *made)))


def _is_triangle(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is attention without a mask, which does half of the square that the formula counts."""
    names = [argument.name for argument in func._schema.arguments]
    return bool((dict(zip(names, args, strict=False)) | kwargs).get("is_causal", False))
