"""A plan, and a search, as text for people."""

from collections.abc import Sequence

from mosaic_dist.hardware import INFINIBAND, MATRIX_PRODUCTS
from mosaic_dist.plan.duration import ASSUMPTIONS
from mosaic_dist.plan.plan import HOST_BYTES_PER_ELEMENT, SECONDS_PER_DAY, SECONDS_PER_HOUR, Plan
from mosaic_dist.plan.search import Refused

GIB = 2**30


def render_plan(plan: Plan) -> str:
    """All figures of a plan, and what they rest on."""
    return "\n\n".join((_layout(plan), _memory(plan), _traffic(plan), _time(plan), _assumptions(plan)))


def _layout(plan: Plan) -> str:
    layout, run = plan.layout, plan.layout.run
    recompute = run.parallel.activation_checkpointing
    ramp = "" if run.batch_ramp is None else f"\nramp: {run.batch_ramp.describe(run.batch_tokens)}"
    again = recompute.parts + (f" in every {recompute.every}th block" if recompute.every > 1 else "")
    return (
        f"{run.name}: {plan.total_parameters:,} parameters, {plan.active_parameters:,} active\n"
        f"{layout.ranks} ranks = {layout.nodes} nodes x {layout.node_ranks} {plan.device.name}, expert parallel "
        f"{layout.degree}, ZeRO {layout.stage}, {layout.precision}, recomputed: {again}\n"
        f"batch: {run.batch_tokens:,} tokens = {run.dealt(layout.ranks)} x {layout.accumulation} micro-batches of "
        f"{run.micro_batch_size} x {run.seq_len:,}{ramp}"
    )


def _memory(plan: Plan) -> str:
    states, peak = plan.memory.states, plan.memory.peak
    rows = {
        "parameters": states.parameters,
        "optimizer": states.optimizer,
        "gradients": peak.gradients,
        "buffers": peak.buffers,
        "activations": peak.activations,
        "peak": plan.memory.peak_bytes,
    }
    table = "\n".join(f"  {name:<12} {size / GIB:>9.2f}" for name, size in rows.items())
    left = plan.device.memory_bytes - plan.memory.peak_bytes
    verdict = f"{left / GIB:.1f} GiB are left for the CUDA context, NCCL and fragmentation"
    if left < 0:
        verdict = f"does not fit: {-left / GIB:.1f} GiB too much; most is {_largest(plan)}"
    return (
        f"GiB per rank at the fullest moment, {peak.name}\n{table}\n  {verdict}\n"
        f"  activations kept between forward and backward: {plan.microbatch.kept_bytes / GIB:.2f}\n  {_host(plan)}"
    )


def _host(plan: Plan) -> str:
    """What lies in the memory of a node, and whether it can."""
    states, ranks = plan.memory.states, plan.layout.node_ranks
    parts = [f"{plan.rank_elements * HOST_BYTES_PER_ELEMENT * ranks / GIB:.0f} of weights at the start"]
    if states.host:
        parts.append(f"{states.host * ranks / GIB:.0f} offloaded ({states.host / GIB:.2f} per rank)")
    text = f"memory of a node's host: {plan.node_bytes / GIB:.0f} = {' + '.join(parts)}"
    if plan.node_memory_bytes is None:
        return text
    left = plan.node_memory_bytes - plan.node_bytes
    if left < 0:
        return f"{text}; does not fit: {-left / GIB:.0f} too much of {plan.node_memory_bytes / GIB:.0f}"
    return f"{text}; {left / GIB:.0f} of {plan.node_memory_bytes / GIB:.0f} are left"


def _largest(plan: Plan) -> str:
    """What to do about the largest part."""
    states, peak = plan.memory.states, plan.memory.peak
    sizes = {
        "weights and gradients (a larger --ep, or --zero 3)": states.parameters + peak.gradients,
        "optimizer states (more ranks, or an offload)": states.optimizer,
        "buffers (a smaller reduce_bucket_size)": peak.buffers,
    }
    if peak.name.startswith("head"):
        fewer = "fewer tokens per micro-batch, or a smaller --model.loss.chunk_tokens"
        sizes[f"activations, of which the logits are many ({fewer})"] = peak.activations
    else:
        sizes["activations (--checkpointing full, a larger --sp, fewer tokens per micro-batch)"] = peak.activations
    return max(sizes, key=lambda name: sizes[name])


def _traffic(plan: Plan) -> str:
    head = f"{'GB per rank and step':<39} ranks  handed over   in node   between nodes"
    rows = (
        f"  {flow.kind:<14} {flow.what:<22} {flow.span.ranks:>6} {flow.handed_over / 1e9:>12.2f} "
        f"{flow.sent_inside / 1e9:>9.2f} {flow.sent_between / 1e9:>15.2f}"
        for flow in plan.flows
    )
    return "\n".join((head, *rows)) if plan.flows else "a single rank sends nothing"


def _time(plan: Plan) -> str:
    terms = ", ".join(f"{name} {seconds:.3f}" for name, seconds in plan.duration._asdict().items())
    executed = plan.microbatch.flops * plan.layout.accumulation * plan.layout.ranks
    per_token = executed / plan.layout.run.batch_tokens
    ramp = ""
    if plan.ramp.steps:
        ramp = f"; {plan.ramp.tokens:,} of them in {plan.ramp.steps:,} smaller batches, {_days(plan.ramp.seconds)}"
    return (
        f"seconds per step: {plan.duration.total:.3f} = {terms}\n"
        f"FLOPs per token: {plan.model_flops_per_token / 1e9:.2f} G by the model, {per_token / 1e9:.2f} G executed\n"
        f"{plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%} of {plan.rate / 1e12:.0f} TFLOP/s per rank\n"
        f"{plan.budget_tokens:,} tokens: {_days(plan.seconds)}, "
        f"{plan.seconds * plan.layout.ranks / SECONDS_PER_HOUR:,.0f} GPU-hours{ramp}"
    )


def _days(seconds: float) -> str:
    return f"{seconds / SECONDS_PER_DAY:,.1f} days"


def _assumptions(plan: Plan) -> str:
    lines = [
        *ASSUMPTIONS,
        "attention runs in the kernel that scaled_dot_product_attention would take",
        f"{plan.device.name}: {plan.device.source}",
    ]
    if plan.memory.states.host:
        lines.append("what is offloaded is updated as fast as on the device, and crosses over to the host in no time")
    if plan.device.kind == "cuda":
        lines += [f"reachable: {MATRIX_PRODUCTS}", f"between nodes: {INFINIBAND}"]
    return "\n".join(["A prediction, not a measurement. It takes that", *(f"  - {line}" for line in lines)])


def render_search(found: Sequence[Plan], refused: Sequence[Refused], shown: int) -> str:
    """The best plans that fit, then how often each reason spoke against one, with the nearest example."""
    columns = ("expert parallel", "sequence parallel", "ZeRO", "micro-batch", "recomputed", "peak GiB", "s/step")
    lines = [f"| {' | '.join(columns)} | tokens/s | MFU |", "|---:|---:|---:|---:|---|---:|---:|---:|---:|"]
    for plan in found[:shown]:
        layout, parallel = plan.layout, plan.layout.run.parallel
        checkpointing = parallel.activation_checkpointing.parts
        lines.append(
            f"| {layout.degree} | {parallel.sequence_parallel} | {layout.stage} | {layout.run.micro_batch_size} "
            f"| {checkpointing} | {plan.memory.peak_bytes / GIB:.1f} | {plan.duration.total:.2f} "
            f"| {plan.tokens_per_second:,.0f} | {plan.mfu:.1%} |"
        )
    head = f"{len(found)} of {len(found) + len(refused)} layouts fit" + (f"; the first {shown}:" if found else ".")
    reasons: dict[str, list[Refused]] = {}
    for one in refused:
        reasons.setdefault(one.reason, []).append(one)
    against = []
    for reason, ones in reasons.items():
        nearest = min(ones, key=lambda one: one.peak_bytes)
        peak = f", {nearest.peak_bytes / GIB:.1f} GiB" if nearest.peak_bytes else ""
        against.append(f"  {len(ones)} x {reason}: {nearest.layout}{peak}")
    others = ["", "The others, each reason with the layout nearest to it:", *against] if against else []
    return "\n".join([head, "", *(lines if found else []), *others])
