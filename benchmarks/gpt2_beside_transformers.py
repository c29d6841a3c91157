"""`gpt2_reference` in small beside GPT-2 of `transformers` in a plain PyTorch loop: the curves must be the same.

`python -m benchmarks.gpt2_beside_transformers --data DIR` trains the recipe, made narrower, with the recipe's own
command (DeepSpeed, one rank, ZeRO-1), and then the other model from the same initial weights, on the same rows in the
same order, with `torch.optim.AdamW`, a clipped gradient and a cosine that are written out here: nothing of ours but the
initial weights and the rows. Both losses are drawn over the steps, and how far they are apart.
"""

import dataclasses
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from mosaic_dist.cli import run_command
from mosaic_dist.convert.hugging_face import export_folder
from mosaic_dist.data import Data
from mosaic_dist.data.stream import Loader
from mosaic_dist.figure import publish, pyplot
from mosaic_dist.files import write_atomic
from mosaic_dist.plan.command import load_recipe
from mosaic_dist.run_spec import Run
from mosaic_dist.spec import Positive, PositiveFloat, override
from mosaic_dist.train.metrics import read_metrics

RECIPE = "recipes/gpt2_reference.py"
NARROW = {"model.dim": 128, "model.layers.attention.heads": 4, "model.layers.ffn.hidden_dim": 512}
BETAS, EPS, FINAL_FRACTION = (0.9, 0.95), 1e-8, 0.1


def small(data: str, steps: int, learning_rate: float, layers: int) -> Run:
    """The recipe, made small, on these data."""
    run = load_recipe(RECIPE)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, layers=run.model.layers[:layers]))
    vocab = Data(path=data).load().vocab_size
    shape = {**NARROW, "model.vocab_size": vocab, "model.max_seq_len": 128, "data.seq_len": 128}
    training = {"batch_tokens": 2048, "micro_batch_size": 16, "schedule.warmup_steps": steps // 10, "data.workers": 0}
    rest = {"steps": steps, "optimizer.learning_rate": learning_rate, "validate_every_steps": 0, "data.path": data}
    return override(run, {**shape, **training, **rest})


def train_ours(run: Run, folder: Path) -> list[float]:
    """The losses of the recipe's own training."""
    written = folder / "run.yaml"
    written.write_text(run.to_yaml())
    words = ["recipes/train.py", "--config", str(written), "--output", str(folder / "run")]
    subprocess.run([sys.executable, *words], check=True)
    return [record["loss"] for record in read_metrics(folder / "run" / "metrics.jsonl")]


def learning_rate_of(step: int, run: Run) -> float:
    """Warm-up in a line, then half a cosine."""
    warmup = run.schedule.warmup_steps
    if step < warmup:
        return run.optimizer.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / (run.steps - warmup)
    return run.optimizer.learning_rate * (FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * done)))


def train_theirs(run: Run, folder: Path) -> list[float]:
    """The losses of the plain loop."""
    weights = {name: weight.detach() for name, weight in run.model.build_initialized(run.seed).named_parameters()}
    export_folder(run.model, weights, folder / "initial", dtype="fp32")
    model = AutoModelForCausalLM.from_pretrained(folder / "initial", dtype=torch.float32).train()
    decaying = [weight for name, weight in model.named_parameters() if ".h." in name and weight.dim() == 2]
    others = [weight for weight in model.parameters() if not any(weight is one for one in decaying)]
    groups = [
        {"params": decaying, "weight_decay": run.optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    rows = iter(
        Loader(
            run.data,
            run.data.load(),
            global_batch=run.batch_sequences,
            rank=0,
            world_size=1,
            seed=run.seed,
            seq_len=run.seq_len,
        )
    )
    losses = []
    for step in tqdm(range(run.steps), desc="transformers", unit="step", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_of(step, run)
        batch = next(rows)
        logits_BTV: Tensor = model(batch.inputs_BT).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def draw(ours: list[float], theirs: list[float], path: Path) -> None:
    """Both curves, and their relative difference."""
    rows = {"sharex": True, "height_ratios": (2, 1)}
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), layout="constrained", **rows)
    steps = range(1, len(ours) + 1)
    above.plot(steps, theirs, color="#c0504d", linewidth=3.0, alpha=0.5, label="transformers, plain loop")
    above.plot(steps, ours, color="#1f4e79", linewidth=1.0, label="mosaic_dist")
    above.set_ylabel("cross-entropy (nats per token)")
    above.legend()
    below.semilogy(steps, [abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)], color="#1f4e79", linewidth=0.8)
    below.set(xlabel="step", ylabel="relative difference")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    publish(figure, path)


def compare(
    data: str,
    steps: Positive = 300,
    layers: Positive = 4,
    learning_rate: PositiveFloat = 1e-3,
    output: str | None = None,
) -> None:
    """Train both and print how far they are apart.

    --data DIR            a dataset of data_prep
    --steps N             updates of 2,048 tokens
    --layers N            of width 128
    --learning_rate X     the peak
    --output FILE         where to write the table; the picture lies beside it, as PNG
    """
    started = time.monotonic()
    run = small(data, steps, learning_rate, layers)
    with tempfile.TemporaryDirectory() as place:
        ours, theirs = train_ours(run, Path(place)), train_theirs(run, Path(place))
    apart = [abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)]
    last = max(1, steps // 10)
    rows = [
        f"`{RECIPE}` with {layers} layers of width 128, {steps} steps of 2,048 tokens, float32; torch "
        f"{torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {time.monotonic() - started:.0f} s.",
        "",
        "| | first loss | last loss | mean of the last tenth |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {losses[0]:.6f} | {losses[-1]:.6f} | {sum(losses[-last:]) / last:.6f} |"
            for name, losses in (("mosaic_dist, DeepSpeed ZeRO-1", ours), ("transformers, plain loop", theirs))
        ),
        "",
        f"Relative difference of the losses: at most {max(apart[:10]):.1e} in the first ten steps, {max(apart):.1e} "
        "in all.",
    ]
    print("\n".join(rows))
    if output is not None:
        write_atomic(output, "\n".join(rows) + "\n")
        draw(ours, theirs, Path(output).with_suffix(".png"))


if __name__ == "__main__":
    run_command(compare, "python -m benchmarks.gpt2_beside_transformers")
