"""A plan's memory through the last micro-batch of a step, as PNG."""

from pathlib import Path

from mosaic_dist.figure import publish, pyplot
from mosaic_dist.plan.plan import Plan
from mosaic_dist.plan.report import GIB

COLORS = {
    "parameters": "#1f4e79",
    "optimizer": "#5b8db8",
    "gradients": "#9ab6d4",
    "buffers": "#d9d9d9",
    "activations": "#e0a458",
}


def draw_memory(plan: Plan, path: Path) -> None:
    """Areas over the phases of the micro-batch and the update, and the device's memory as a line."""
    memory = plan.memory
    points = memory.points
    heights = {
        "parameters": [memory.states.parameters] * len(points),
        "optimizer": [memory.states.optimizer] * len(points),
        "gradients": [point.gradients for point in points],
        "buffers": [point.buffers for point in points],
        "activations": [point.activations for point in points],
    }
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    gib = [[height / GIB for height in values] for values in heights.values()]
    axes.stackplot(range(len(points)), gib, labels=list(heights), colors=list(COLORS.values()), step="mid")
    axes.axhline(plan.device.memory_bytes / GIB, color="#c0504d", linestyle="--", label=f"{plan.device.name} memory")
    turn = len(points) // 2
    axes.set_xticks([0, turn - 1, len(points) - 2], ["forward", "logits and loss", "end of backward"])
    layout = plan.layout
    axes.set(
        ylabel="GiB per rank, tensors",
        title=f"{layout.run.name}: {layout.ranks} {plan.device.name}, expert parallel {layout.degree}, "
        f"ZeRO {layout.stage}, {layout.run.micro_batch_size} x {layout.run.seq_len:,} tokens (predicted)",
    )
    axes.set_xlim(0, len(points) - 1)
    axes.set_ylim(0, max(plan.device.memory_bytes, memory.peak_bytes) / GIB * 1.08)
    figure.legend(loc="outside lower center", ncols=6)
    axes.grid(alpha=0.3, axis="y")
    publish(figure, path)
