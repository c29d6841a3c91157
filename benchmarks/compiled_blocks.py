"""Forward and backward pass of a model with plain blocks beside one with compiled blocks, on the same weights.

`python -m benchmarks.compiled_blocks` on a CPU or a GPU. In one process both have their turn in each round, so both see
the same machine; the figures are medians over the rounds. What the first pass of the compiled one takes longer is the
time of the compilation, into an empty cache.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Literal

import torch

from benchmarks.circumstances import circumstances, heading, write_results
from mosaic_dist.cli import run_command
from mosaic_dist.model import (
    GQA,
    ActivationCheckpointing,
    Block,
    MoE,
    RoPE,
    SwiGLU,
    Transformer,
    check_compiler,
    compile_layers,
)
from mosaic_dist.spec import Positive

VOCAB = 512
"""Small, for the head is not compiled."""
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass
class Result:
    """Seconds of one kind of block."""

    blocks: str
    dtype: str
    plain: float
    compiled: float
    ratio: float
    """Median over the rounds of compiled / plain."""
    compilation: float
    loss_differs: float
    """Of the first pass, relative."""


def model_of(kind: str, dim: int, layers: int, tokens: int) -> Transformer:
    """Equal blocks with a dense network, or with as wide experts of which two of eight are chosen."""
    dense = SwiGLU(hidden_dim=dim * 8 // 3 // 64 * 64)
    ffn = dense if kind == "dense" else MoE(expert=dense, experts=8, top_k=2)
    block = Block(attention=GQA(heads=dim // 64, kv_heads=max(1, dim // 256)), ffn=ffn)
    return Transformer(vocab_size=VOCAB, dim=dim, max_seq_len=tokens, position=RoPE(), layers=(block,) * layers)


def stepper(spec: Transformer, dtype: torch.dtype, device: torch.device, batch: int, is_compiled: bool) -> Callable:
    """A function that does a forward and a backward pass and gives the loss."""
    model = spec.build_initialized(0, device).to(dtype)
    if is_compiled:
        compile_layers(model, ActivationCheckpointing(), device)
    tokens_BT = torch.randint(0, VOCAB, (batch, spec.max_seq_len + 1), generator=torch.Generator().manual_seed(1)).to(
        device
    )

    def step() -> float:
        parts = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
        (parts.cross_entropy_sum / (batch * spec.max_seq_len) + parts.auxiliary).backward()
        for parameter in model.parameters():
            parameter.grad = None
        return parts.cross_entropy_sum.item()  # a GPU has done its forward pass then; the next step waits for the rest

    return step


def measure(
    kind: str, spec: Transformer, dtype: torch.dtype, device: torch.device, batch: int, rounds: int, clock: str
) -> Result:
    """Both in turn."""
    now = CLOCKS[clock]
    steps = {name: stepper(spec, dtype, device, batch, name == "compiled") for name in ("plain", "compiled")}
    first, losses, seconds = {}, {}, {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            started = now()
            loss = step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = now() - started
            if turn == 0:
                first[name], losses[name] = took, loss
            elif turn > 1:
                seconds[name].append(took)
    plain, compiled = (statistics.median(seconds[name]) for name in ("plain", "compiled"))
    ratio = statistics.median(b / a for a, b in zip(seconds["plain"], seconds["compiled"], strict=True))
    differs = abs(losses["compiled"] / losses["plain"] - 1)
    name = str(dtype).removeprefix("torch.")
    return Result(kind, name, plain, compiled, ratio, first["compiled"] - compiled, differs)


def table(results: list[Result]) -> str:
    """As Markdown."""
    rows = [
        "| blocks | dtype | plain, ms | compiled, ms | ratio | compilation, s | loss differs |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(
            f"| {r.blocks} | {r.dtype} | {1e3 * r.plain:.0f} | {1e3 * r.compiled:.0f} | {r.ratio:.2f} "
            f"| {r.compilation:.0f} | {r.loss_differs:.0e} |"
            for r in results
        ),
    ]
    return "\n".join(rows)


def compiled_blocks(
    dim: Positive = 512,
    layers: Positive = 4,
    tokens: Positive = 512,
    batch: Positive = 1,
    rounds: Positive = 9,
    blocks: str = "dense,moe",
    dtypes: str = "float32,bfloat16",
    clock: Literal["wall", "cpu"] = "wall",
    output: str | None = None,
) -> None:
    """Compare models with plain and with compiled blocks, and print a table.

    --dim N               width of the model; a head is 64 wide
    --layers N            equal blocks
    --tokens N            of a sequence
    --batch N             sequences
    --rounds N            how often each runs, after two to warm up
    --blocks LIST         of dense, moe
    --dtypes LIST         of weights and activations
    --clock NAME          wall; or cpu, the time of this process's threads, where others keep the machine busy
    --output FILE         write the table there as well, as Markdown, and the figures beside it as JSON
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_compiler(device.type == "cuda")
    results = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for kind in blocks.split(","):
            for dtype in dtypes.split(","):
                torch._dynamo.reset()
                spec = model_of(kind, dim, layers, tokens)
                results.append(measure(kind, spec, getattr(torch, dtype), device, batch, rounds, clock))
                print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    facts = circumstances("benchmarks.compiled_blocks")
    page = (
        f"{heading('Compiled blocks beside plain ones, forward and backward', facts)} {layers} layers of width {dim}, "
        f"{batch} x {tokens} tokens, medians of {rounds} rounds, {clock} time.\n\n{table(results)}"
    )
    print(page)
    if output is not None:
        write_results(output, page, facts, [dataclasses.asdict(result) for result in results])


if __name__ == "__main__":
    run_command(compiled_blocks, "python -m benchmarks.compiled_blocks")
