"""One or two layers of the largest recipes at their true width: forward, backward and a step, for real.

`python -m benchmarks.full_width` takes `gptoss_20b` and `gptoss_120b` and the released architectures, keeps their first
layers and their whole vocabulary where it fits (`--vocab`), and trains a few steps on one batch of random tokens: in
bfloat16 with plain SGD on a CPU, where AdamW's states would not fit beside, and with AdamW on a GPU. Every slice has a
process of its own, so that its peak of memory is its own: resident memory beyond that of the imports on a CPU, what the
allocator gave on a GPU. The loss must fall from step to step; the command fails if it does not.
"""

import dataclasses
import itertools
import json
import os
import platform
import subprocess
import sys
import time

import torch
from tqdm import tqdm

from mosaic_dist.cli import run_command
from mosaic_dist.files import write_atomic
from mosaic_dist.memory import keep_freed_memory
from mosaic_dist.model import Transformer, count_parameters
from mosaic_dist.plan.command import load_recipe
from mosaic_dist.spec import NonNegative, Positive
from mosaic_dist.train.memory import peak_memory_bytes

RECIPES = ("gptoss_20b", "gptoss_120b", "openai_gptoss_20b", "openai_gptoss_120b")
LEARNING_RATES = {"cpu": 0.1, "cuda": 1e-4}  # of SGD and of AdamW


def cut(recipe: str, layers: int, vocab: int) -> Transformer:
    """The first layers of a recipe's model, its vocabulary unless another one is given."""
    model = load_recipe(f"recipes/{recipe}.py").model
    return dataclasses.replace(model, layers=model.layers[:layers], vocab_size=vocab or model.vocab_size)


def train(recipe: str, layers: int, vocab: int, tokens: int, steps: int) -> dict[str, object]:
    """Train a slice; its size, the losses, and what a step took."""
    keep_freed_memory()
    spec = cut(recipe, layers, vocab)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = 0 if device.type == "cuda" else peak_memory_bytes()
    torch.set_default_dtype(torch.bfloat16)  # weights are never there in float32
    model = spec.build_initialized(0).to(device)
    torch.set_default_dtype(torch.float32)
    make = torch.optim.SGD if device.type == "cpu" else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=LEARNING_RATES[device.type], foreach=False)
    chance = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(spec.vocab_size, (1, tokens + 1), generator=chance).to(device)
    losses, seconds = [], []
    for _ in tqdm(range(steps), desc=f"{recipe}, {layers} layers", unit="step", disable=None):
        started = time.perf_counter()
        parts = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
        (parts.cross_entropy_sum / tokens + parts.auxiliary).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts.cross_entropy_sum.item() / tokens)  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return {
        "parameters": count_parameters(spec).total,
        "losses": losses,
        "seconds": min(seconds),
        "peak_bytes": peak_memory_bytes() - before,
    }


def row(recipe: str, layers: int, vocab: int, tokens: int, found: dict[str, object]) -> str:
    """A line of the table."""
    losses = " -> ".join(f"{loss:.2f}" for loss in found["losses"])  # type: ignore[attr-defined]
    figures = (f"{found['parameters']:,}", losses, f"{found['seconds']:.1f}", f"{found['peak_bytes'] / 2**30:.1f}")  # type: ignore[operator]
    return f"| `{recipe}` | {layers} | {vocab or 'true'} | {tokens:,} | {' | '.join(figures)} |"


def full_width(
    recipes: str | tuple[str, ...] = RECIPES,
    layers: int | tuple[int, ...] = (1, 2),
    vocab: NonNegative = 0,
    tokens: Positive = 128,
    steps: Positive = 3,
    output: str | None = None,
    child: bool = False,
) -> None:
    """Train slices of the largest models and print a table.

    --recipes NAMES       of the recipes folder, without .py, as gptoss_20b,gptoss_120b
    --layers NUMBERS      how many of the first layers, as 1,2: a slice each
    --vocab N             words, where the true vocabulary does not fit; 0: the true one
    --tokens N            of the one sequence
    --steps N             on the same tokens
    --output FILE         write the table there as well
    --child               train the one slice here, and print its figures as JSON
    """
    names = recipes.split(",") if isinstance(recipes, str) else recipes
    counts = (layers,) if isinstance(layers, int) else layers
    if child:
        print(json.dumps(train(names[0], counts[0], vocab, tokens, steps)))
        return
    rows = []
    for recipe, count in itertools.product(names, counts):
        words = f"--child --recipes {recipe} --layers {count} --vocab {vocab} --tokens {tokens} --steps {steps}".split()
        command = [sys.executable, "-m", "benchmarks.full_width", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{recipe}, {count} layers: exit code {done.returncode} (-9: killed, most likely for memory)")
        found = json.loads(done.stdout)
        rows.append(row(recipe, count, vocab, tokens, found))
        print(rows[-1], flush=True)
        if found["losses"] != sorted(found["losses"], reverse=True):
            sys.exit("its loss does not fall")
    has_gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if has_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    text = "\n".join(
        (
            f"`python -m benchmarks.full_width {' '.join(sys.argv[1:])}`, torch {torch.__version__}, {where}",
            "",
            "| slice of | layers | vocabulary | tokens | parameters | loss | s / step | peak GiB |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *rows,
        )
    )
    print(text)
    if output is not None:
        write_atomic(output, text + "\n")


if __name__ == "__main__":
    run_command(full_width, "python -m benchmarks.full_width")
