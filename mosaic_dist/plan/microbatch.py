"""A micro-batch on the meta device: what each part of a model keeps, needs, computes and sends.

The model's own code runs, forward and backward, with true shapes and without memory, over one block of each kind and
with choices that are dealt out evenly to the experts; `Microbatch` then puts as many blocks together as there are.
"""

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.model import ActivationCheckpointing, MixtureOfExperts, Transformer, apply_activation_checkpointing
from mosaic_dist.model.attention import kernel
from mosaic_dist.model.ffn import ffn
from mosaic_dist.model.ffn.kernel import run_grouped, run_in_turn
from mosaic_dist.parallel import Sequences, place_experts, place_sequences
from mosaic_dist.plan.recorder import Phase, Recorder, Sent, Work, replaced

aten = torch.ops.aten


AttentionKernels = Literal["flash", "efficient", "cpu"]
"""PyTorch's fused attention: of GPUs from compute capability 8.0 on in 16 bits, of other GPUs, of CPUs."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a micro-batch looks like on one rank."""

    model: Transformer
    degree: int
    sequences: int
    seq_len: int
    dtype: torch.dtype
    activation_checkpointing: ActivationCheckpointing
    expert_chunks: int = 1
    sequence_parallel: int = 1
    documents: bool = False
    """Whether tokens see their own document only; counted is one document per sequence, which is the most work."""
    attention: AttentionKernels = "flash"
    grouped: bool = True
    """Whether all experts are one product."""


SHARERS = "sequence"
"""Stands for the group of ranks that share sequences."""


class Moment(NamedTuple):
    """A phase of the whole micro-batch in its place."""

    name: str
    part: str
    """The block, "embedding" or "head"."""
    is_backward: bool
    begin_bytes: int
    """What earlier phases keep."""
    peak_bytes: int
    """The most at a time, that included."""
    gradient_peak_bytes: int
    """The most when the gradient of a parameter is made, that included."""


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """All phases of a micro-batch, in order. Gradients of parameters count only until they are made."""

    moments: tuple[Moment, ...]
    work: Counter[Work]
    sent: Counter[Sent]

    @property
    def peak_bytes(self) -> int:
        """The most that activations take at a time."""
        return max(moment.peak_bytes for moment in self.moments)

    @property
    def kept_bytes(self) -> int:
        """What lies between forward and backward."""
        return next(moment.begin_bytes for moment in self.moments if moment.is_backward)

    @property
    def flops(self) -> int:
        """Of matrix products and attention, with everything that runs twice."""
        return sum(work.flops * times for work, times in self.work.items())


@functools.cache
def run_microbatch(setting: Setting) -> Microbatch:
    """Estimate activations and FLOPs of one micro-batch. The same for every rank, but for the rows that do not divide
    evenly.
    """
    flags = [_is_recomputed(setting, i) for i in range(len(setting.model.layers))]
    kinds = list(dict.fromkeys(zip(setting.model.layers, flags, strict=True)))
    of_blocks = [kinds.index(kind) for kind in zip(setting.model.layers, flags, strict=True)]
    sequences = Sequences(setting.sequence_parallel, 0, setting.sequence_parallel, SHARERS)
    model = _model_of_kinds(setting, kinds, sequences)
    tokens_BT = torch.empty(setting.sequences, setting.seq_len, dtype=torch.int64, device="meta")
    recorder = Recorder("meta")
    _mark_parts(model, recorder)
    with recorder.alone(), _kernels(setting), recorder:
        recorder.mark("embedding forward")
        mine_BT = sequences.cut(tokens_BT)
        metadata = sequences.metadata(tokens_BT, tokens_BT if setting.documents else None)
        parts = model(mine_BT, mine_BT, metadata=metadata)
        loss = parts.cross_entropy_sum + parts.auxiliary
        recorder.mark("head backward")
        loss.backward()
        del parts, loss
    return _put_together({phase.name: phase for phase in recorder.phases}, of_blocks)


def _is_recomputed(setting: Setting, block: int) -> bool:
    return setting.activation_checkpointing.parts != "none" and block % setting.activation_checkpointing.every == 0


def without_capacity(model: Transformer) -> Transformer:
    """The model without limits on the choices of an expert: what is dropped depends on the tokens."""

    def unlimited(block: Any) -> Any:
        if getattr(block.ffn, "capacity_factor", None) is None:
            return block
        return dataclasses.replace(
            block, ffn=dataclasses.replace(block.ffn, capacity_factor=None, drop_policy="position")
        )

    return dataclasses.replace(model, layers=tuple(unlimited(block) for block in model.layers))


def _model_of_kinds(setting: Setting, kinds: list[tuple[Any, bool]], sequences: Sequences) -> Any:
    """A model with one block of each kind, as a rank holds it."""
    spec = dataclasses.replace(setting.model, layers=tuple(block for block, _ in kinds))
    with torch.device("meta"):
        model: Any = without_capacity(spec).build()
    place_experts(model, setting.degree, 0)
    place_sequences(model, sequences)
    for layer in model.modules():
        if isinstance(layer, MixtureOfExperts):
            layer.dispatcher, layer.chunks = EvenRouting(layer.dispatcher), setting.expert_chunks
    flagged = [block for block, (_, again) in zip(model.layers, kinds, strict=True) if again]
    once: Any = SimpleNamespace(layers=flagged)
    apply_activation_checkpointing(once, ActivationCheckpointing(parts=setting.activation_checkpointing.parts))
    return model.to("meta", setting.dtype)  # some buffers are numbers from the start


class EvenRouting(nn.Module):
    """A dispatcher that gives every expert the same number of rows; counts have values, also on the meta
    device.
    """

    def __init__(self, dispatcher: Any):
        super().__init__()
        self.dispatcher = dispatcher

    def forward(self, x_SD: Tensor, rows: Any, experts: Any, overlap_fn: Any) -> Tensor:
        """Pass the rows on, with equal numbers of them for all experts."""
        R, E = len(rows.tokens_R), len(rows.counts_E)
        counts_E = (torch.arange(E + 1) * R // E).diff()  # what does not divide is spread over the ranks, too
        return self.dispatcher(x_SD, rows._replace(counts_E=counts_E), experts, overlap_fn)

    def total_counts(self, counts_E: Tensor) -> Tensor:
        """Choices per expert of all data-parallel ranks."""
        return self.dispatcher.total_counts(counts_E)

    def micro_batch_counts(self, counts: Tensor) -> Tensor:
        """Choices per expert of a micro-batch, over the ranks that share it."""
        return self.dispatcher.micro_batch_counts(counts)


def _mark_parts(model: Any, recorder: Recorder) -> None:
    """Begin a phase where a block begins, forward and backward, and let go of each gradient once it is made."""

    def entering(part: str, before: str, _: Any, inputs: tuple[Any, ...]) -> None:
        inputs[0].register_hook(lambda _: recorder.mark(f"{before} backward"))
        recorder.mark(f"{part} forward")

    parts = {f"layers.{i}": block for i, block in enumerate(model.layers)} | {"head": model.norm}
    for (name, part), before in zip(parts.items(), ["embedding", *parts], strict=False):
        part.register_forward_pre_hook(functools.partial(entering, name, before))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(functools.partial(_hand_over_gradient, recorder))


def _hand_over_gradient(recorder: Recorder, parameter: Tensor) -> None:
    recorder.note_gradient()
    parameter.grad = None


@contextlib.contextmanager
def _kernels(setting: Setting) -> Iterator[None]:
    """Let experts and attention take the kernels that they would take on the device, which torch asks a tensor for."""

    def grouped(x_SD: Tensor, rows: Any, *rest: Any) -> Tensor:
        return run_grouped(x_SD, rows._replace(counts_E=rows.counts_E.to(x_SD.device)), *rest)

    written_out = functional.scaled_dot_product_attention  # which is what the meta device makes of it
    attention = functools.partial(fused_attention, setting.attention, written_out)

    def takes_groups(q_BNTH: Tensor, k_BGSH: Tensor, v_BGSU: Tensor, mask: Tensor | None, dropout: float) -> bool:
        return setting.attention == "cpu" or (setting.attention == "flash" and mask is None)

    with (
        replaced(kernel, takes_groups=takes_groups),
        replaced(ffn, run_experts=grouped if setting.grouped else run_in_turn),
        replaced(functional, scaled_dot_product_attention=attention),
    ):
        yield


ALIGNMENT_BYTES = 16
"""A head's width is a multiple of so much for the memory-efficient kernel (torch's sdp_utils.cpp)."""


def fused_attention(
    kind: AttentionKernels,
    written_out: Callable[..., Tensor],
    q_BNTH: Tensor,
    k_BGSH: Tensor,
    v_BGSH: Tensor,
    *,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    """`scaled_dot_product_attention` by the kernel that torch takes on a device; `written_out` where it has none.

    The flash kernel has no masks; the memory-efficient one keeps them as numbers, wants aligned widths, and as many
    key-value heads as query heads; the one for CPUs wants one width.
    """
    heads = q_BNTH, k_BGSH, v_BGSH
    aligned = all(x.shape[-1] * x.itemsize % ALIGNMENT_BYTES == 0 for x in heads)
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.empty_like(mask, dtype=q_BNTH.dtype)
    if kind == "flash" and mask is None:
        return aten._scaled_dot_product_flash_attention(*heads, dropout_p, is_causal, scale=scale)[0]
    if kind == "cpu" and q_BNTH.shape[-1] == v_BGSH.shape[-1]:
        return aten._scaled_dot_product_flash_attention_for_cpu(
            *heads, dropout_p, is_causal, attn_mask=mask, scale=scale
        )[0]
    if kind != "cpu" and aligned and q_BNTH.shape[1] == k_BGSH.shape[1]:
        wide = None if mask is None else mask.expand(*q_BNTH.shape[:3], k_BGSH.shape[2])
        return aten._scaled_dot_product_efficient_attention(*heads, wide, True, dropout_p, is_causal, scale=scale)[0]
    return written_out(
        *heads, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _put_together(phases: dict[str, Phase], of_blocks: list[int]) -> Microbatch:
    """The phases of all blocks, in order, from those of one block of each kind."""
    forward = [("embedding", "embedding"), *((f"layers.{i}", f"layers.{k}") for i, k in enumerate(of_blocks))]
    forward.append(("head", "head"))
    moments: list[Moment] = []
    work: Counter[Work] = Counter()
    sent: Counter[Sent] = Counter()
    live = 0
    for direction, parts in (("forward", forward), ("backward", forward[::-1])):
        for part, like in parts:
            phase = phases[f"{like} {direction}"]
            most = live + phase.peak_bytes, live + phase.gradient_peak_bytes
            moments.append(Moment(f"{part} {direction}", part, direction == "backward", live, *most))
            live += phase.change_bytes
            work += phase.work
            sent += phase.sent
    return Microbatch(tuple(moments), work, sent)
