"""Tokens per second of reading: ours beside a NumPy memmap with the same shuffled order, and what a step waits for it.

`python -m benchmarks.data_reading --raw DIR --packed DIR` takes one text prepared twice, the second time with
`--compression zstd`. Contenders make the same batches of `t4_moe` (32,768 tokens, int64 inputs and targets), have their
turn in each round, and the figures are medians; the first batch is not timed. The CPU's time is that of all threads and
tells more than the clock where others use the machine.

memmap          rows copied from one flat file of token ids that is mapped into memory
workers=N       `Loader` with N reading threads, every shard checked by its hash before its first use
zstd, first     the compressed data where nothing is inflated yet: the first pass over it
zstd, later     the same data once the shards are inflated beside it

Then `t4_moe` itself is trained for a few steps with small batches, and `data_share` of its metrics is told.
"""

import contextlib
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mosaic_dist.cli import run_command
from mosaic_dist.data import Data
from mosaic_dist.data.batch import Batch, make_batch
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.order import Order
from mosaic_dist.data.shards import Shards
from mosaic_dist.data.stream import Loader
from mosaic_dist.files import write_atomic
from mosaic_dist.train.metrics import read_metrics

BATCH_TOKENS = 32_768
SEED = 1


def loader(info: DatasetInfo, workers: int) -> Iterator[Batch]:
    """Our batches."""
    batch = BATCH_TOKENS // info.seq_len
    return iter(Loader(Data(workers=workers), info, global_batch=batch, rank=0, world_size=1, seed=SEED))


def flatten(info: DatasetInfo, path: Path) -> None:
    """The tokens of a split as one flat file."""
    shards = Shards(info, "train")
    with open(path, "wb") as file:
        for numbers in np.array_split(np.arange(len(shards)), max(1, len(shards) // 1000)):
            file.write(shards.read(numbers)[:, :-1].tobytes())
        file.write(shards.read(np.array([len(shards) - 1]))[:, -1:].tobytes())


def memmap(info: DatasetInfo, path: Path) -> Iterator[Batch]:
    """The same batches from a flat file."""
    order = Order(Shards(info, "train").shard_samples, SEED)
    tokens, length, batch = np.memmap(path, info.dtype, "r"), info.seq_len, BATCH_TOKENS // info.seq_len
    for cursor in itertools.count(step=batch):
        samples = order.take(cursor, batch)
        rows_BT = np.stack([tokens[i * length : (i + 1) * length + 1] for i in samples])
        yield make_batch(samples, rows_BT, None, None)


def drop_inflated(info: DatasetInfo) -> None:
    """Leave the compressed shards alone."""
    for entry in info.index("train"):
        (info.path / "train" / entry["raw_data"]["basename"]).unlink(missing_ok=True)


def speed(batches: Iterator[Batch], steps: int) -> tuple[float, float]:
    """Tokens per second over some steps, the first left out; and seconds of CPU per token, workers and all steps in."""
    before = sum(os.times()[:4])
    next(batches)
    started = time.perf_counter()
    for _ in range(steps):
        next(batches)
    seconds = time.perf_counter() - started
    if hasattr(batches, "close"):
        batches.close()
    return steps * BATCH_TOKENS / seconds, (sum(os.times()[:4]) - before) / ((steps + 1) * BATCH_TOKENS)


def wait_share(info: DatasetInfo, workers: int, steps: int) -> tuple[float, float]:
    """Train `t4_moe` on this machine; tokens per second, and the share of its steps that it waited for data."""
    with tempfile.TemporaryDirectory() as folder:
        words = (
            f"recipes/t4_moe.py --data {info.path} --output {folder}/run --data.workers {workers} --batch_tokens 4096 "
            f"--micro_batch_size 2 --steps {steps} --schedule.warmup_steps 1 --validate_every_steps 0 "
            f"--checkpoint.every_steps {steps} --model.vocab_size {max(8192, info.vocab_size)}"
        )
        environment = os.environ | {"PYTHONPATH": "."}
        subprocess.run([sys.executable, *words.split()], check=True, capture_output=True, env=environment)
        records = read_metrics(Path(folder, "run", "metrics.jsonl"))[1:]
    seconds = sum(record["step_seconds"] for record in records)
    share = sum(record["data_seconds"] for record in records) / seconds
    return 4096 * len(records) / seconds, share


def main(
    raw: str, packed: str, rounds: int = 5, steps: int = 60, train_steps: int = 5, output: str | None = None
) -> None:
    """Time reading.

    --raw DIR         a dataset of data_prep without compression
    --packed DIR      the same with `--compression zstd`
    --rounds N        turns of each contender
    --steps N         batches of a turn
    --train_steps N   of `t4_moe`; 0 leaves it out
    --output FILE     also write the table there
    """
    info, zipped = DatasetInfo.load(raw), DatasetInfo.load(packed)
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        flat = Path(folder, "tokens.bin")
        flatten(info, flat)
        contenders: dict[str, Callable[[], Iterator[Batch]]] = {"memmap": lambda: memmap(info, flat)}
        for workers in (0, 1, 2):
            contenders[f"workers={workers}"] = lambda workers=workers: loader(info, workers)  # type: ignore[misc]
        contenders["zstd, first, workers=2"] = lambda: (drop_inflated(zipped), loader(zipped, 2))[1]
        contenders["zstd, later, workers=2"] = lambda: loader(zipped, 2)
        ours, theirs = loader(info, 0), memmap(info, flat)
        for one, other in itertools.islice(zip(ours, theirs, strict=True), 5):
            assert one.sample_ids == other.sample_ids
            assert (one.inputs_BT == other.inputs_BT).all()
            assert (one.targets_BT == other.targets_BT).all()
        for _ in range(rounds):
            for name, make in contenders.items():
                found.setdefault(name, []).append(speed(make(), steps))
    rows = ["| reader | million tokens/s | best round | CPU ms per million tokens |", "|---|---:|---:|---:|"]
    for name, turns in found.items():
        speeds, costs = zip(*turns, strict=True)
        middle, cost = statistics.median(speeds), statistics.median(costs)
        rows.append(f"| {name} | {middle / 1e6:.1f} | {max(speeds) / 1e6:.1f} | {cost * 1e9:,.0f} |")
    if train_steps:
        rows += ["", "| `t4_moe`, 4,096 tokens a step | tokens/s | waiting for data |", "|---|---:|---:|"]
        for workers in (0, 2):
            tokens_per_second, share = wait_share(info, workers, train_steps + 1)
            rows.append(f"| workers={workers} | {tokens_per_second:,.0f} | {share:.3%} |")
    table = "\n".join([heading(info, rounds, steps), "", *rows]) + "\n"
    print(table)
    if output:
        write_atomic(output, table)


def heading(info: DatasetInfo, rounds: int, steps: int) -> str:
    """Where the figures come from."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    split, cpu = info.split("train"), platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    words = " ".join(sys.argv[1:])
    return (
        f"# Reading\n\n`python -m benchmarks.data_reading {words}`\n\nat commit {commit or 'unknown'}, {cpu}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {split.tokens:,} tokens of {info.dtype} in "
        f"{split.shards} shards ({split.shard_bytes / 1e6:,.0f} MB), sequences of {info.seq_len}; medians of {rounds} "
        f"rounds of {steps} batches."
    )


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.data_reading")
