"""The table of the results, and how they compare with results of before."""

from typing import Any

GIB = 2**30


def render(results: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Results as a Markdown page. `facts` tell the command, the commit, the hardware and so on."""
    lines = [
        "# Training steps",
        "",
        f"`{facts['command']}` at commit {facts['commit']}, {facts['date']}, torch {facts['torch']}, deepspeed "
        f"{facts['deepspeed']}, transformers {facts['transformers']}, {facts['hardware']}; medians of "
        f"{facts['rounds']} rounds, in each of which every contender makes one step, each time another one first.",
        "",
        "A step is forward, loss, backward, clipping and AdamW on one micro-batch. All start from the same weights and "
        "see the same random tokens. Under DeepSpeed (ZeRO-1): ours, `transformers` (the architecture named) and "
        "`autoep` (the same with DeepSpeed's AutoEP layers); `plain` is GPT-2 by hand in plain PyTorch. Each is a "
        "process of its own, as its users run it, in the precision in which it is faster. `memory kept` is given what "
        "our runs ask of malloc besides: large blocks that are freed stay in the process. Ours computes its balance "
        "loss, the others none.",
        "",
        "TFLOP/s and MFU count 6 operations per active matrix weight and token and those of causal attention "
        "(`model.count.flops_per_token`). MFU is relative to the ceiling: the step's own dominant matrix products "
        "alone, at their best of five tries by either library, in the contender's precision. Peak is of all tensors: "
        f"{facts['memory']}.",
        "",
        "| recipe | contender | precision | tokens/s | ours is | TFLOP/s | MFU | peak GiB | first loss |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        lines += [_row(result, name) for name in result["contenders"]]
    lines += ["", "| recipe | layers | width | vocabulary | tokens | parameters | ceiling TFLOP/s | changed |"]
    lines += ["|---|---:|---:|---:|---:|---:|---|---|", *map(_shape, results)]
    lines += ["", "Where our step's time goes, under torch's profiler:", "", *_phases(results)]
    return "\n".join(lines) + "\n"


def _row(result: dict[str, Any], name: str) -> str:
    found = result["contenders"][name]
    kept = ", memory kept" if name.endswith("_kept") else ""
    label = f"transformers ({result['twin']}){kept}" if name.startswith("transformers") else name
    ratio = "" if name == "ours" else f"{result['times'][name]:.2f}x"
    figures = (
        f"{found['tokens_per_second']:,.0f}",
        ratio,
        f"{found['tflops']:.3f}",
        f"{found['mfu']:.0%}",
        f"{found['peak_bytes'] / GIB:.2f}",
        f"{found['losses'][0]:.6f}",
    )
    return f"| `{result['recipe']}` | {label} | {found['precision']} | {' | '.join(figures)} |"


def _shape(result: dict[str, Any]) -> str:
    ceilings = ", ".join(f"{name} {rate:.3f}" for name, rate in result["ceiling_tflops"].items())
    tokens = f"{result['micro_batch_size']} x {result['seq_len']}"
    size = f"{result['layers']} | {result['dim']} | {result['vocab']:,} | {tokens}"
    parameters = result["contenders"]["ours"]["parameters"]
    return f"| `{result['recipe']}` | {size} | {parameters:,} | {ceilings} | {result['said']} |"


def _phases(results: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for result in results for name in result["phases"]))
    rows = [f"| recipe | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for result in results:
        shares = (f"{result['phases'][name]:.0%}" if name in result["phases"] else "" for name in names)
        rows.append(f"| `{result['recipe']}` | {' | '.join(shares)} |")
    return rows


def compare(new: list[dict[str, Any]], old: list[dict[str, Any]]) -> str:
    """For people: tokens/s now as a multiple of those before, of each row that both have."""
    before = {result["recipe"]: result for result in old}
    rows = [f"{'recipe':<16} {'contender':<18} {'new/old tokens/s':>16} {'new/old peak':>13} {'lead: new (old)':>18}"]
    for result in new:
        was = before.get(result["recipe"], {"contenders": {}})
        rows += [_change(result, was, name) for name in result["contenders"] if name in was["contenders"]]
    return "\n".join(rows)


def _change(now: dict[str, Any], was: dict[str, Any], name: str) -> str:
    speed, peak = ratios(now["contenders"][name], was["contenders"][name])
    lead = "" if name == "ours" else f"{now['times'][name]:.2f} ({was['times'][name]:.2f})"
    return f"{now['recipe']:<16} {name:<18} {speed:>16.2f} {peak:>13.2f} {lead:>18}"


def ratios(now: dict[str, Any], was: dict[str, Any]) -> tuple[float, float]:
    """Tokens per second and peak memory of a row, as multiples of those of before."""
    return now["tokens_per_second"] / was["tokens_per_second"], now["peak_bytes"] / was["peak_bytes"]
