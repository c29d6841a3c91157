"""Forward and backward of one mixture-of-experts layer: ours beside what people use, on the same weights and tokens.

`python -m benchmarks.moe_layer` on a CPU or a GPU. In one process every contender has its turn in each round, so all
of them see the same machine; the figures are medians over the rounds. Contenders:

ours              `MoE` with SwiGLU experts, no token dropped
hf                the block of Mixtral in `transformers`; of the ways that version 5 computes experts, the grouped one
autoep            DeepSpeed's AutoEP layer, made from that block
deepspeed         `deepspeed.moe.layer.MoE`, no token dropped: every expert is padded to the fullest
deepspeed_drop    the same with capacity factor 1: less work, another result
torch.mm          the same products on as many rows by one dense network, and nothing else: the ceiling
oneDNN            the same in float32 on a CPU by torch's other library, which our layer takes where it is faster

Contenders that need an expert's weights in another form get them so, copied; what they compute is compared with ours.
"""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

from benchmarks.circumstances import circumstances, heading, write_results
from mosaic_dist.cli import run_command
from mosaic_dist.memory import gc_frozen
from mosaic_dist.model import MixtureOfExperts, MoE, SwiGLU, TopKSoftmax
from mosaic_dist.parallel import join_world, leave_world

CPU_SIZES = (
    "512x512x1024x8x1 512x512x1024x8x2 512x512x256x64x8 2048x512x1024x8x1 2048x512x1024x8x2 2048x512x256x64x8 "
    "16384x512x1024x8x1 16384x512x1024x8x2 16384x512x256x64x8"
)
EXPERTS = "grouped_mm"
"""The fastest of the ways in which transformers 5 computes experts, on CPUs too; 4 has one way and ignores it."""
GPU_SIZES = "16384x768x2048x8x2 16384x768x512x64x8 16384x2048x5632x8x2 16384x2880x2880x32x4"
MOST_ROUTING_BYTES = 4 << 30
"""DeepSpeed's own layer makes tensors [S, E, capacity]; sizes where one is larger are left out for it."""


@dataclass(frozen=True)
class Size:
    """S tokens of width D, E experts of hidden width F, K of them per token."""

    S: int
    D: int
    F: int
    E: int
    K: int


@dataclass
class Contender:
    """A layer in the ring: `step` does a forward and a backward pass and returns output and input gradient."""

    step: Callable[[], tuple[Tensor, Tensor]]
    parameters: list[nn.Parameter]


class Plain(nn.Module):
    """A SwiGLU network as its users write it, for the layers that take any expert module."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, width, bias=False), nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


def make_block(size: Size, device: torch.device, dtype: torch.dtype) -> MixtralSparseMoeBlock:
    """The layer whose weights all others get."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=size.D,
        intermediate_size=size.F,
        num_local_experts=size.E,
        num_experts_per_tok=size.K,
        router_jitter_noise=0.0,
        experts_implementation=EXPERTS,
    )
    block = MixtralSparseMoeBlock(config)
    for weight in block.parameters():  # nn.Linear's own initial values; stacked experts come without any
        nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
    return block.to(device, dtype)


def expert_weights(block: MixtralSparseMoeBlock) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Gate [F, D], up [F, D] and down [D, F] of each expert: modules in transformers 4, stacked in 5."""
    if isinstance(block.experts, nn.ModuleList):
        for expert in block.experts:
            yield expert.w1.weight, expert.w3.weight, expert.w2.weight
    else:
        for gate_up, down in zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True):
            yield *gate_up.chunk(2), down


@torch.no_grad()
def make_ours(block: MixtralSparseMoeBlock, size: Size) -> MixtureOfExperts:
    """Our layer with the block's weights."""
    spec = MoE(expert=SwiGLU(hidden_dim=size.F), experts=size.E, top_k=size.K, router=TopKSoftmax(), aux_loss_coef=0.0)
    layer: Any = spec.build(size.D).to(block.gate.weight)
    layer.router.weight.copy_(block.gate.weight)
    for e, weights in enumerate(expert_weights(block)):
        for name, weight in zip(("gate", "up", "down"), weights, strict=True):
            getattr(layer.experts, name).weight[e] = weight.T
    return layer


def make_autoep(block: MixtralSparseMoeBlock, size: Size) -> nn.Module:
    """DeepSpeed's AutoEP layer with the block's weights, on one rank."""
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.module_inject.auto_ep_presets.base import MoELayerSpec

    stacked = not isinstance(block.experts, nn.ModuleList)
    spec = MoELayerSpec(
        moe_module_name="mlp",
        model_family="mixtral",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d" if stacked else "module_list",
        expert_w1_name="gate_up_proj" if stacked else "w1",
        expert_w2_name="down_proj" if stacked else "w2",
        expert_w3_name=None if stacked else "w3",
        num_experts=size.E,
        top_k=size.K,
        hidden_size=size.D,
        ffn_hidden_size=size.F,
        score_func="softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
    layer = AutoEPMoELayer(spec, block, ep_size=1, ep_rank=0, config=AutoEPConfig(enabled=True, autoep_size=1))
    layer.set_deepspeed_parallelism()
    return layer


@torch.no_grad()
def make_deepspeed(block: MixtralSparseMoeBlock, size: Size, drop: bool) -> nn.Module:
    """`deepspeed.moe.layer.MoE` with the block's weights, on one rank."""
    layer = deepspeed.moe.layer.MoE(
        size.D, Plain(size.D, size.F), size.E, k=size.K, drop_tokens=drop, use_rts=False, top2_2nd_expert_sampling=False
    )
    layer.set_deepspeed_parallelism()
    layer = layer.to(block.gate.weight)
    layer.deepspeed_moe.gate.wg.weight.data = block.gate.weight.float().clone()  # it wants its gate in float32
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    for expert, (gate, up, down) in zip(experts, expert_weights(block), strict=True):
        expert.w1.weight.copy_(gate), expert.w3.weight.copy_(up), expert.w2.weight.copy_(down)
    return layer


def enter(layer: nn.Module, x_BTD: Tensor, direction_BTD: Tensor) -> Contender:
    """A layer whose forward gives its output, alone or first of several."""
    parameters = list(layer.parameters())

    def step() -> tuple[Tensor, Tensor]:
        for parameter in parameters:
            parameter.grad = None
        x = x_BTD.detach().requires_grad_()
        out = layer(x)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(direction_BTD)
        assert x.grad is not None
        return out, x.grad

    return Contender(step, parameters)


def dense(size: Size, x_BTD: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Contender:
    """The nine products of a dense SwiGLU network on S * K rows, and nothing else."""
    R = size.S * size.K
    x, hidden = x_BTD.new_empty(R, size.D).normal_(), x_BTD.new_empty(R, size.F).normal_()
    into, back = x_BTD.new_empty(size.D, size.F).normal_(), x_BTD.new_empty(size.F, size.D).normal_()

    @torch.no_grad()
    def step() -> tuple[Tensor, Tensor]:
        for _ in ("gate", "up"):
            multiply(x, into), multiply(hidden, into.T), multiply(x.T, hidden)
        multiply(hidden, back), multiply(x, back.T), multiply(hidden.T, x)
        return x, x

    return Contender(step, [])


def ceilings(size: Size, x_BTD: Tensor) -> dict[str, Contender]:
    """Dense products by the libraries that torch has for them."""
    libraries: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch.mm": torch.mm}
    if x_BTD.dtype == torch.float32 and not x_BTD.is_cuda and torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        libraries["oneDNN"] = lambda a, b: linear(a, b.T, None, "none", [], "")
    return {name: dense(size, x_BTD, multiply) for name, multiply in libraries.items()}


def contenders(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Contender]:
    """All that can run this size."""
    block = make_block(size, device, dtype)
    generator = torch.Generator().manual_seed(1)
    x, direction = (torch.randn(1, size.S, size.D, generator=generator).to(device, dtype) for _ in range(2))
    layers = {"ours": make_ours(block, size), "hf": block, "autoep": make_autoep(block, size)}
    if 4 * size.S * size.S * size.K * 2 <= MOST_ROUTING_BYTES:  # routing is rarely worse than twice the even share
        layers |= {"deepspeed": make_deepspeed(block, size, False), "deepspeed_drop": make_deepspeed(block, size, True)}
    ring = {name: enter(layer, x, direction) for name, layer in layers.items()}
    return ring | ceilings(size, x)


def kept_bytes(contender: Contender, device: torch.device) -> int:
    """What a forward and backward needs at its peak beyond weights and input (GPU), or keeps in between (CPU)."""
    if device.type == "cuda":
        for parameter in contender.parameters:
            parameter.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contender.step()
        return torch.cuda.max_memory_allocated() - before
    own = {parameter.untyped_storage().data_ptr() for parameter in contender.parameters}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other can take its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contender.step()
    return sum(storage.nbytes() for storage in kept.values())


def time_rounds(ring: dict[str, Contender], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ring}
    for turn in range(rounds + 1):
        for name, contender in ring.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            contender.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def difference(ring: dict[str, Contender], name: str) -> float:
    """Largest difference of output or input gradient from ours, relative to the largest value."""
    pairs = zip(ring["ours"].step(), ring[name].step(), strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def measure(size: Size, rounds: int, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Table rows of one size."""
    ring = contenders(size, device, dtype)
    differs = {name: difference(ring, name) for name in ring if name != "ours" and ring[name].parameters}
    kept = {name: kept_bytes(contender, device) for name, contender in ring.items()}
    with gc_frozen():
        seconds = time_rounds(ring, rounds, device)
    median = {name: statistics.median(values) for name, values in seconds.items()}

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds["ours"], strict=True))

    words = " ".join(f"{key}={value}" for key, value in vars(size).items())
    rows = []
    for name in ring:
        told = f"{differs[name]:.0e}" if name in differs else ""
        memory = f"{kept[name] / size.S / 1024:.1f}" if ring[name].parameters else ""
        rows.append(f"| {words} | {name} | {median[name] * 1e3:.1f} | {ratio(name):.2f} | {memory} | {told} |")
    return rows


def render(rows: list[str], facts: dict[str, Any], rounds: int, device: torch.device, dtype: torch.dtype) -> str:
    """The page of results."""
    memory = "at the peak" if device.type == "cuda" else "kept between forward and backward"
    return (
        f"{heading('One mixture-of-experts layer, forward and backward', facts)} {str(dtype).removeprefix('torch.')}; "
        f"medians of {rounds} rounds. KiB per token: {memory}, weights left out. Differs: largest difference from ours "
        "in output and input gradient, relative to the largest value. `torch.mm` and `oneDNN` are the products of a "
        "dense network on as many rows: they read one expert's weights instead of all, so no layer with few rows per "
        "expert gets near.\n\n| layer | contender | ms | times ours | KiB per token | differs |\n"
        "|---|---|---:|---:|---:|---:|\n" + "\n".join(rows)
    )


def moe_layer(sizes: str | None = None, rounds: int = 7, dtype: str = "auto", output: str | None = None) -> None:
    """Compare one mixture-of-experts layer with its peers and print a table.

    --sizes "SxDxFxExK ..."  tokens x width x expert width x experts x choices per token
    --rounds N               how often each contender runs
    --dtype NAME             float32 or bfloat16; auto: bfloat16 on a GPU, float32 on a CPU
    --output FILE            write the table there as well, as Markdown
    """
    world = join_world(60)
    deepspeed.init_distributed(dist_init_required=False)
    device = world.device
    kind = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(dtype) or getattr(torch, dtype)
    facts, rows, page = circumstances("benchmarks.moe_layer"), [], ""
    for words in (sizes or (GPU_SIZES if device.type == "cuda" else CPU_SIZES)).split():
        measured = measure(Size(*map(int, words.split("x"))), rounds, device, kind)
        rows += measured
        print("\n".join(measured), file=sys.stderr, flush=True)
        page = render(rows, facts, rounds, device, kind)
        if output:  # what was measured stays, should the next size be too large
            write_results(output, page, facts, rows)
        gc.collect()
    print(page)
    leave_world()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_command(moe_layer, "python -m benchmarks.moe_layer")
