"""`python -m benchmarks.gpu_probe`: what the libraries of a GPU do with our shapes, in about a minute.

Every part runs by itself: an error ends that part only, and counts in the exit code. On a CPU the sizes are tiny, and
only show that the parts run.
"""

import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.circumstances import processor
from mosaic_dist.cli import run_command
from mosaic_dist.model import (
    GQA,
    MHA,
    ActivationCheckpointing,
    Block,
    MoE,
    RoPE,
    SwiGLU,
    Transformer,
    compile_layers,
)
from mosaic_dist.model.attention.attention import AttentionMetadata
from mosaic_dist.model.attention.blocks import attend_visible
from mosaic_dist.model.ffn import ffn, kernel
from mosaic_dist.profiling.phases import PREFIX, STEP, spent

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16
SHRUNK = 1 if ON_GPU else 64
"""By which sizes are divided."""

Row = tuple[str, str, str]
"""Name, value, and what there is to say about it."""


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def seconds(action: Callable[[], object]) -> float:
    """Of one call."""
    synchronize()
    started = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - started


def median_ms(action: Callable[[], object], times: int = 10) -> float:
    """The median of some calls after three others, in milliseconds."""
    if not ON_GPU:
        return 1e3 * seconds(action)
    return 1e3 * statistics.median([seconds(action) for _ in range(3 + times)][3:])


def random(*shape: int, grad: bool = False) -> Tensor:
    """Random numbers: on constants a GPU is faster than in training."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=grad)


def facts() -> Iterator[Row]:
    """Versions, and the order in which torch tries its attention kernels."""
    yield "torch", torch.__version__, f"Python {sys.version.split()[0]}"
    if not ON_GPU:
        yield "device", "cpu", processor()
        return
    yield "device", torch.cuda.get_device_name(), f"compute capability {torch.cuda.get_device_capability()}"
    yield "cudnn", str(torch.backends.cudnn.version()), f"nccl {torch.cuda.nccl.version()}"
    q = random(1, 1, 128, 64)
    functional.scaled_dot_product_attention(q, q, q, is_causal=True)  # the order is settled at the first call
    yield "order of SDPA kernels", str(torch._C._get_sdp_priority_order()), "0 math, 1 flash, 2 efficient, 3 cudnn"


def ceilings() -> Iterator[Row]:
    """A large product, a copy, and the head's products at two vocabularies."""
    n = 8192 // SHRUNK
    a, b = random(n, n), random(n, n)
    yield "8192^3 product", f"{2 * n**3 / median_ms(lambda: a @ b) / 1e9:.0f}", "TFLOP/s"
    x = torch.empty(2**31 // SHRUNK**3, device=DEVICE, dtype=torch.int8).random_()
    y = torch.empty_like(x)
    yield "copy", f"{2 * x.nbytes / median_ms(lambda: y.copy_(x)) / 1e9:.2f}", "TB/s, read and written"
    for vocab in (50_257, 50_304):
        rows, table, grad = (
            random(*shape) for shape in ((n // 2, 768), (vocab // SHRUNK, 768), (n // 2, vocab // SHRUNK))
        )
        ms = median_ms(lambda rows=rows, table=table, grad=grad: (rows @ table.T, grad @ table, grad.T @ rows))
        yield f"head's products, vocabulary {vocab}", f"{ms:.2f} ms", f"{6 * grad.numel() * 768 / ms / 1e9:.0f} TFLOP/s"


def attention() -> Iterator[Row]:
    """Attention of the recipes' shapes, forward and backward, and the kernels that it takes longest in."""
    cases = {  # sequences, heads, key-value heads, tokens, widths of keys and values, sinks, window
        "gpt2_reference": (12, 12, 12, 1024, 64, 64, False, None),
        "mosaic_small (MLA)": (8, 12, 12, 2048, 96, 64, False, None),
        "gptoss_20b (GQA)": (1, 32, 8, 8192, 64, 64, False, None),
        "openai_gptoss, full (sinks)": (1, 64, 8, 8192, 64, 64, True, None),
        "openai_gptoss, sliding (sinks)": (1, 64, 8, 8192, 64, 64, True, 128),
    }
    for name, (B, N, G, T_full, H, U, has_sinks, window) in cases.items():
        T = max(32, T_full // SHRUNK)
        heads = [random(B, n, T, width, grad=True) for n, width in ((N, H), (G, H), (G, U))]
        sinks_N = random(N, grad=True) if has_sinks else None
        index = torch.arange(T, device=DEVICE)
        metadata = AttentionMetadata(index, index[None])

        def step(heads=heads, metadata=metadata, window=window, sinks_N=sinks_N) -> None:
            attend_visible(*heads, metadata, sliding_window=window, sinks_N=sinks_N).sum().backward()

        first, ms = seconds(step), median_ms(step)
        keys = min(T, window or T)
        flops = 3.5 * 2 * B * N * (H + U) * (T * keys - keys**2 / 2)
        yield (
            f"attention of {name}",
            f"{ms:.2f} ms",
            f"{flops / ms / 1e9:.0f} TFLOP/s; first {first:.2f} s; {longest(step)}",
        )


def longest(step: Callable[[], object]) -> str:
    """The names of the two kernels that a step spends most time in."""
    if not ON_GPU:
        return "no kernels"
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds(step)
    averages = sorted(profiler.key_averages(), key=lambda average: -average.self_device_time_total)
    return " + ".join(average.key[:40] for average in averages[:2])


def documents() -> Iterator[Row]:
    """Packed documents come in new shapes with every batch: what the first call of a shape costs."""
    for with_cudnn in (True, False) if ON_GPU else (True,):
        torch.backends.cuda.enable_cudnn_sdp(with_cudnn)
        pairs = []
        for rows in (21, 22, 23):
            x = random(rows, 12, max(32, 512 // SHRUNK), 64, grad=True)

            def step(x=x) -> None:
                functional.scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()

            pairs.append((seconds(step), seconds(step)))
        firsts, seconds_again = (1e3 * sum(times) / len(pairs) for times in zip(*pairs, strict=True))
        yield f"new shape, cuDNN {'on' if with_cudnn else 'off'}", f"{firsts:.1f} ms", f"again {seconds_again:.1f} ms"
    torch.backends.cuda.enable_cudnn_sdp(True)


def experts() -> Iterator[Row]:
    """Mixtures by the grouped product and one expert after the other; experts without rows, and an odd width."""
    for name, (S, D, F, E, K) in {
        "mosaic_small": (16384, 768, 1344, 8, 2),
        "openai_gptoss_20b": (8192, 2880, 2880, 32, 4),
    }.items():
        layer = MoE(expert=SwiGLU(hidden_dim=max(8, F // SHRUNK)), experts=E, top_k=K).build(max(8, D // SHRUNK))
        layer.to(DEVICE, DTYPE)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        x = random(1, S // SHRUNK, max(8, D // SHRUNK), grad=True)
        times = {}
        for way in (kernel.run_grouped, kernel.run_in_turn):
            ffn.run_experts = way
            times[way.__name__] = median_ms(lambda layer=layer, x=x: layer(x)[0].sum().backward(), times=5)
        ffn.run_experts = kernel.run_experts
        flops = 3 * 3 * 2 * S * K * D * F / SHRUNK**3
        best = min(times.values())
        ways = ", ".join(f"{way} {ms:.2f}" for way, ms in times.items())
        yield f"mixture of {name}", f"{best:.2f} ms", f"{flops / best / 1e9:.0f} TFLOP/s; {ways}"
    weight = random(4, 64, 32, grad=True)
    junk = [torch.full_like(weight, torch.nan) for _ in range(64)]
    del junk  # so that what is left unwritten shows
    ends = torch.tensor([100, 100, 256, 256], device=DEVICE, dtype=torch.int32)
    functional.grouped_mm(random(256, 64), weight, offs=ends).float().square().sum().backward()
    assert weight.grad is not None
    yield "torch's gradients without rows", f"{weight.grad[[1, 3]].abs().max().item():.3g}", "0 needs no guard"
    functional.grouped_mm(random(0, 64, grad=True), weight, offs=torch.zeros_like(ends)).square().sum().backward()
    yield "no rows at all", "pass", "as on a rank whose experts nobody chose"
    odd = MoE(expert=SwiGLU(hidden_dim=100), experts=4).build(60).to(DEVICE, DTYPE)
    for parameter in odd.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    odd(random(1, 64, 60))[0].sum().backward()
    yield "experts of 60 x 100", "pass", "widths that no kernel takes"


def phases() -> Iterator[Row]:
    """What `mosaic_dist profile` adds up, beside the kernels' own time."""
    a = random(2048 // SHRUNK, 2048 // SHRUNK)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with profile(activities=activities) as profiler, record_function(STEP), record_function(PREFIX + "attention"):
        for _ in range(20):
            a = (a @ a).clamp(-1, 1)
        synchronize()
    found = sum(phase.total for phase in spent(profiler.events(), ON_GPU).values())
    kernels = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    whole = sum(e.time_range.elapsed_us() for e in kernels) / 1e6
    yield "phases over kernels", f"{found / whole:.3f}" if kernels else "-", "1 is right"


def compiled() -> Iterator[Row]:
    """Graphs of a compiled block."""
    for name, kind in {"MHA": MHA(heads=4), "GQA": GQA(heads=4, kv_heads=2)}.items():
        torch._dynamo.reset()
        counters.clear()
        block = Block(attention=kind, ffn=SwiGLU(hidden_dim=512 // min(8, SHRUNK)))
        spec = Transformer(vocab_size=512, dim=256 // min(4, SHRUNK), max_seq_len=256, position=RoPE(), layers=(block,))
        model = spec.build_initialized(0, DEVICE).to(DTYPE)
        compile_layers(model, ActivationCheckpointing(), DEVICE, "aot_eager")
        tokens_BT = torch.randint(512, (2, 257 // min(8, SHRUNK)), device=DEVICE)
        model(tokens_BT[:, :-1], tokens_BT[:, 1:]).cross_entropy_sum.backward()
        breaks = sum(counters["graph_break"].values())
        yield (
            f"graphs of a {name} block",
            str(counters["stats"]["unique_graphs"]),
            f"{breaks} breaks; 1 and 0 are right",
        )


PARTS = (facts, ceilings, attention, documents, experts, phases, compiled)


def gpu_probe() -> None:
    """Print what attention, experts, products and the compiler do on this GPU; exit code 1 where a part failed."""
    failed = 0
    for part in PARTS:
        started = time.perf_counter()
        try:
            for name, value, note in part():
                print(f"{name[:34]:<34} {value:>14}  {note}", flush=True)
        except Exception:
            failed += 1
            traceback.print_exc()
            sys.stderr.flush()
            print(f"{part.__name__:<34} {'FAILED':>14}  {traceback.format_exc().splitlines()[-1][:120]}", flush=True)
        print(f"({part.__name__}: {time.perf_counter() - started:.1f} s)", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command(gpu_probe, "python -m benchmarks.gpu_probe")
