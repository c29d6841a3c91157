"""Ranks of test_layer: one mixture over three ranks, with tokens and choices as bad as they can be.

Each rank checks its part against the same layer on one device with the tokens of all ranks.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from mosaic_dist.model import Experts, Init, MixtureOfExperts, MoE, SwiGLU, initialize, materialize
from mosaic_dist.parallel import World, join_world, leave_world, place_experts

RANKS, DIM, EXPERTS, TOP_K = 3, 8, 6, 2
SPEC = MoE(expert=SwiGLU(hidden_dim=12, bias=True), experts=EXPERTS, top_k=TOP_K, shared_experts=1)
CHUNKS = 4
TIMEOUT_SECONDS = 30
"""Of each exchange."""


class Case(NamedTuple):
    """Tokens of each rank, and the experts that all of them choose among; None: the router's own choice."""

    tokens: tuple[int, ...]
    among: tuple[int, ...] | None = None
    top_k: int = TOP_K


CASES = {
    "as the router chooses": Case((7, 7, 7)),
    "all to one expert": Case((9, 9, 9), (4,), 1),
    "all to one rank": Case((9, 9, 9), (0, 1)),
    "a rank without rows": Case((7, 7, 7), (0, 1, 4)),
    "one token each": Case((1, 1, 1)),
    "one token in all": Case((0, 1, 0)),
    "different numbers": Case((5, 0, 11)),
    "different numbers to one expert": Case((5, 0, 11), (3,), 1),
}


def build(spec: MoE, world: World | None) -> MixtureOfExperts:
    """The layer with its initial weights: the part of a rank, or (None) all of it on one device."""
    with torch.device("meta"):
        layer = spec.build(DIM)
    if world is not None:
        place_experts(layer, RANKS, world.rank)
    materialize(layer, torch.device("cpu"))
    initialize(layer, Init(std=0.5), 1, 0)
    if world is not None:
        layer.dispatcher.set_deepspeed_parallelism()
    return layer


def choose_among(layer: MixtureOfExperts, case: Case) -> None:
    """Let the layer's tokens take turns among the experts of a case."""

    def choose(logits_SE: Tensor) -> Tensor:
        order = torch.arange(len(logits_SE) * case.top_k).view(-1, case.top_k)
        return torch.tensor(case.among)[order % len(case.among)]

    if case.among is not None:
        layer.router.choose = choose


def run(layer: MixtureOfExperts, x_SD: Tensor, direction_SD: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of the inputs and of every parameter."""
    x_SD = x_SD.clone().requires_grad_()
    out_BTD, _ = layer(x_SD[None])
    (out_BTD[0] * direction_SD).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out_BTD[0].detach(), "x": x_SD.grad} | gradients


def compare(world: World, case: Case, chunks: int) -> dict[str, Any]:
    """The largest difference from one device, and the most rows that were at this rank's experts at a time."""
    spec = replace(SPEC, top_k=case.top_k)
    whole, mine = build(spec, None), build(spec, world)
    generator = torch.Generator().manual_seed(3)
    x_SD, direction_SD = (torch.randn(sum(case.tokens), DIM, generator=generator) for _ in range(2))
    own = slice(sum(case.tokens[: world.rank]), sum(case.tokens[: world.rank + 1]))
    # the choice of a token is that of its place among all
    choose_among(whole, case)
    if case.among is not None:
        chosen_SK = whole.router.choose(torch.empty(len(x_SD), EXPERTS))[own]
        mine.router.choose = lambda _: chosen_SK
    rows = record_rows(mine)
    mine.chunks = chunks
    expected, got = run(whole, x_SD, direction_SD), run(mine, x_SD[own], direction_SD[own])
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    held = slice(world.rank * EXPERTS // RANKS, (world.rank + 1) * EXPERTS // RANKS)
    apart = []
    for name, value in got.items():
        if name in ("out", "x"):
            wanted = expected[name][own]
        elif name.startswith("experts."):
            wanted = expected[name][held]
        else:
            dist.all_reduce(value)
            wanted = expected[name]
        apart.append((value - wanted).abs().max().item() if value.numel() else 0.0)
    return {"apart": max(apart), "rows": max(rows), "passes": len(rows)}


def record_rows(layer: MixtureOfExperts) -> list[int]:
    """A list that grows with the number of rows of each pass through the layer's experts."""
    rows: list[int] = []

    def noting(_: Experts, inputs: tuple[Tensor, ...]) -> None:
        rows.append(len(inputs[0]))

    layer.experts.register_forward_pre_hook(noting)
    return rows


def kept_bytes(world: World, chunks: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, with all tokens at one rank."""
    case = Case((48, 48, 48), (0, 1))
    layer = build(SPEC, world)
    choose_among(layer, case)
    layer.chunks = chunks
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out_BTD, _ = layer(torch.randn(1, 48, DIM, requires_grad=True))
    out_BTD.sum().backward()
    return sum(kept.values())


class Journal:
    """Notes every all-to-all of a layer, with its bytes, and when its shared network and experts are at work."""

    def __init__(self, layer: MixtureOfExperts):
        self.events: list[str] = []
        self.sent_bytes: list[int] = []
        for name in ("shared", "experts"):
            module = getattr(layer, name)
            module.register_forward_hook(lambda *_, name=name: self.events.append(name))
            module.register_full_backward_hook(lambda *_, name=name: self.events.append(f"{name} backward"))

    def __enter__(self) -> "Journal":
        self.original = dist.all_to_all_single
        dist.all_to_all_single = self.all_to_all_single
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single = self.original

    def all_to_all_single(self, out: Tensor, sent: Tensor, *words: Any, **named: Any) -> Any:
        """The real one, noted; its work notes when it is waited for."""
        self.sent_bytes.append(sent.nbytes)
        work = self.original(out, sent, *words, **named)
        if not named.get("async_op"):
            self.events.append("counts")
            return work
        self.events.append("start")
        return Awaited(work, self.events)


class Awaited(NamedTuple):
    """An exchange under way that notes when it is waited for."""

    work: Any
    events: list[str]

    def wait(self) -> None:
        """Until it has ended."""
        self.events.append("wait")
        self.work.wait()


def journal(world: World, dtype: torch.dtype) -> dict[str, Any]:
    """Events and bytes of a forward and backward pass of 7 tokens."""
    layer = build(SPEC, world).to(dtype)
    x_SD = torch.randn(7, DIM, dtype=dtype, generator=torch.Generator().manual_seed(world.rank))
    with Journal(layer) as seen:
        run(layer, x_SD, torch.ones(7, DIM, dtype=dtype))
    return {"events": seen.events, "sent_bytes": sum(seen.sent_bytes), "tokens": 7, "itemsize": dtype.itemsize}


def main(output: str) -> None:
    """Write what each rank found as JSON, a list over ranks."""
    world = join_world(TIMEOUT_SECONDS)
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    torch.manual_seed(0)
    found = {
        "cases": {
            f"{name}/{chunks}": compare(world, case, chunks) for name, case in CASES.items() for chunks in (1, CHUNKS)
        },
        "kept_bytes": {str(chunks): kept_bytes(world, chunks) for chunks in (1, CHUNKS)},
        "journals": [journal(world, dtype) for dtype in (torch.float32, torch.bfloat16)],
    }
    of_ranks: list[Any] = [None] * world.size
    dist.all_gather_object(of_ranks, found)
    if world.is_main:
        Path(output).write_text(json.dumps(of_ranks))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
