"""Saving, loading and exporting beside the disk itself and beside DeepSpeed's own checkpoints, in one process run.

`python -m benchmarks.checkpoint --millions 100,400` trains one step of a model of that size under ZeRO-1, so that
weights and moments are there (12 bytes per parameter), and then does in turn, several times:

    raw write     the same bytes in pieces of 64 MiB into one file, fsync       raw read     back into memory
    save          ours, every rank its part, hashed and fsynced                 load         ours, every hash checked
    DeepSpeed     its save_checkpoint, which does not sync; and with a sync     load         its load_checkpoint
    background    how long training waits for an asynchronous save that is copied beside the next step; and the copy
    cp            of the float32 weights, with a sync                           export       of the same, float32

Before each reading the files are dropped from the page cache as far as the system lets us. Best of `--rounds`.

With `--exports` nothing is trained: another process writes a checkpoint of weights alone, and this one copies and
exports it in turns, with the files in the page cache and without. Every round is told.
"""

import gc
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import torch
from tqdm import tqdm

from mosaic_dist.checkpoint import Checkpoint, TensorShard, save
from mosaic_dist.checkpoint.background import BackgroundSave
from mosaic_dist.checkpoint.engine_state import engine_state, load_engine, save_engine
from mosaic_dist.checkpoint.store import BLOCK_BYTES
from mosaic_dist.convert import export_checkpoint
from mosaic_dist.convert.native import expected_shapes
from mosaic_dist.data.tokenizer import train_bpe
from mosaic_dist.memory import keep_freed_memory
from mosaic_dist.model import GQA, Block, RMSNorm, RoPE, SwiGLU, Transformer, Untied, count_parameters
from mosaic_dist.optim import AdamW
from mosaic_dist.parallel import Engine, World, fill_config, join_world, leave_world

OPTIMIZER = AdamW(learning_rate=1e-3)
TOKENS = 256


def spec(millions: int) -> Transformer:
    """A dense model of about so many parameters: 12 layers whose width follows from the size."""
    dim = round((millions * 1e6 / (12 * 16)) ** 0.5 / 64) * 64
    block = Block(attention=GQA(heads=dim // 64, kv_heads=dim // 64), ffn=SwiGLU(hidden_dim=4 * dim))
    return Transformer(
        vocab_size=512,
        dim=dim,
        max_seq_len=TOKENS,
        position=RoPE(),
        layers=12 * (block,),
        norm=RMSNorm(),
        head=Untied(),
    )


def trained(model: Transformer, world: World) -> Engine:
    """An engine after one step."""
    config = fill_config(
        {"zero_optimization": {"stage": 1}},
        precision="fp32",
        micro_batch_size=1,
        accumulation=1,
        world_size=world.size,
        max_grad_norm=1.0,
    )
    engine = Engine(model, OPTIMIZER, config, 1, 0, world)
    step(engine)
    return engine


def step(engine: Engine) -> None:
    """Forward, backward and update with TOKENS tokens."""
    tokens_BT = torch.arange(TOKENS).view(1, TOKENS)
    engine.train_step(tokens_BT, tokens_BT, 1e-3)


class Watch:
    """Seconds of each kind of work, best of all rounds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Do the work on a disk that has nothing left to write."""
        os.sync()
        started = time.perf_counter()
        result = work()
        self.keep(name, time.perf_counter() - started)
        return result

    def keep(self, name: str, seconds: float) -> None:
        """Seconds that were measured elsewhere."""
        self.seconds[name] = min(seconds, self.seconds.get(name, seconds))


def sync(path: Path) -> None:
    """Bring a file, or all files of a folder, to the disk."""
    for file in [path] if path.is_file() else (found for found in path.rglob("*") if found.is_file()):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def forget(path: Path) -> None:
    """Drop the files of a folder, or one file, from the page cache."""
    for file in [path] if path.is_file() else (found for found in path.rglob("*") if found.is_file()):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_raw(path: Path, block: memoryview, size_bytes: int) -> None:
    """One file, as fast as the disk takes it."""
    with open(path, "wb", buffering=0) as file:
        left = size_bytes
        while left:
            left -= file.write(block[:left])
        os.fsync(file.fileno())


def read_raw(path: Path, block: memoryview) -> None:
    """The file's bytes into memory that is there already."""
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def disk(watch: Watch, folder: Path, block: memoryview, size_bytes: int) -> None:
    """What the disk does with so many bytes."""
    path = folder / "raw"
    watch.time("raw write", lambda: write_raw(path, block, size_bytes))
    forget(path)
    watch.time("raw read", lambda: read_raw(path, block))
    path.unlink()


def ours(watch: Watch, folder: Path, engine: Engine, background: BackgroundSave) -> Path:
    """Save, load, and save in the background; returns the checkpoint."""
    root = folder / "ours"
    saved = watch.time("save", lambda: save_engine(root, 1, engine, {}))
    forget(saved)
    watch.time("load", lambda: load_engine(Checkpoint.open(saved), engine))
    os.sync()
    background.start(root, 2, engine_state(engine, {}), lambda seconds: watch.keep("background", seconds))
    started = time.perf_counter()
    step(engine)
    watch.keep("step beside a background save", time.perf_counter() - started)
    background.wait()
    watch.time("step", lambda: step(engine))
    shutil.rmtree(root / "step_00000002")
    return saved


def deepspeeds(watch: Watch, folder: Path, engine: Engine) -> None:
    """What DeepSpeed itself saves and loads; its files hold pickles, which it reads as it does."""
    root = folder / "deepspeed"
    root.mkdir(exist_ok=True)

    def save_and_sync() -> None:
        engine.deepspeed.save_checkpoint(str(root), tag="synced")
        sync(root / "synced")

    watch.time("DeepSpeed save", lambda: engine.deepspeed.save_checkpoint(str(root), tag="plain"))
    watch.time("DeepSpeed save, synced", save_and_sync)
    forget(root)
    watch.time("DeepSpeed load", lambda: engine.deepspeed.load_checkpoint(str(root), tag="plain"))
    shutil.rmtree(root)


def export_beside_copy(watch: Watch, folder: Path, model: Transformer, checkpoint: Path, weights: Path) -> None:
    """Export to float32 beside a copy of the same bytes."""

    def copy() -> None:
        shutil.copyfile(weights, folder / "copy")
        sync(folder / "copy")

    forget(weights)
    watch.time("cp", copy)
    (folder / "copy").unlink()
    output, tokenizer = folder / "exported", folder / "tokenizer.json"
    forget(checkpoint)
    watch.time("export", lambda: export_checkpoint(Checkpoint.open(checkpoint), model, "m", tokenizer, output))
    os.replace(output / "model.safetensors", weights)
    shutil.rmtree(output)


def write_weights_alone(folder: Path, millions: int) -> None:
    """A checkpoint of float32 weights, and a tokenizer."""
    shapes = expected_shapes(spec(millions))
    pieces = [TensorShard(name, "master", 0, torch.ones(math.prod(shape))) for name, shape in shapes.items()]
    save(folder, 1, pieces, shapes, {}, {})
    train_bpe(["one two"], 259).save(folder / "tokenizer.json")


def exports_alone(folder: Path, millions: int, rounds: int) -> str:
    """Seconds of copies and exports as Markdown, and the speed of the exports beside that of the copies.

    Both go first in turn and remove what they wrote at once, after a round that does not count: memory that a virtual
    machine has not had before is slow when it is touched, also as page cache.
    """
    writing = multiprocessing.get_context("spawn").Process(target=write_weights_alone, args=(folder, millions))
    writing.start()
    writing.join()
    (checkpoint,) = folder.glob("step_*")
    (weights,) = checkpoint.glob("*.safetensors")
    model, copied, exported, rows = spec(millions), folder / "copy", folder / "exported", []

    def copy() -> None:
        shutil.copyfile(weights, copied)
        sync(copied)

    def export() -> None:
        export_checkpoint(Checkpoint.open(checkpoint), model, "m", folder / "tokenizer.json", exported)

    for place in ("in the page cache", "dropped from it"):
        for number in range(rounds + 1):
            watch, contenders = Watch(), [("cp", copy), ("export", export)]
            for name, work in contenders if number % 2 else reversed(contenders):
                if place != "in the page cache":
                    forget(weights)
                watch.time(name, work)
                copied.unlink(missing_ok=True)
                shutil.rmtree(exported, ignore_errors=True)
            cp, taken = watch.seconds["cp"], watch.seconds["export"]
            if number:
                rows.append(f"| {place} | {cp:.2f} | {taken:.2f} | {cp / taken:.0%} |")
    size = weights.stat().st_size
    head = [f"| {millions}M, {size / 1e9:.2f} GB, files | cp, s | export, s | speed of cp |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *rows])


def table(millions: int, watch: Watch, size_bytes: int, weight_bytes: int) -> list[str]:
    """Rows of Markdown: seconds, speed, and the ratio to what it is compared with."""
    seconds = watch.seconds
    against = {
        "save": "raw write",
        "load": "raw read",
        "DeepSpeed save": "save",
        "DeepSpeed save, synced": "save",
        "DeepSpeed load": "load",
        "background": "save",
        "step beside a background save": "step",
        "export": "cp",
    }
    rows = [f"| {millions}M parameters, {size_bytes / 1e9:.2f} GB | seconds | MB/s | time |", "|---|---:|---:|---:|"]
    for name, taken in seconds.items():
        moved = weight_bytes if name in ("cp", "export") else size_bytes
        peer = against.get(name)
        ratio = f"{taken / seconds[peer]:.2f} x {peer}" if peer else ""
        rows.append(f"| {name} | {taken:.3f} | {moved / taken / 1e6:,.0f} | {ratio} |")
    return rows


def main(
    millions: int | tuple[int, ...] = (100, 400), rounds: int = 3, folder: str | None = None, exports: bool = False
) -> None:
    """Print a table for each size.

    Args:
        millions: sizes of the models, in millions of parameters.
        rounds: how often each work is done; the best counts.
        folder: where to write; a folder of its own is made there and removed.
        exports: only these, in a process that has trained nothing.
    """
    keep_freed_memory()
    sizes = millions if isinstance(millions, tuple) else (millions,)
    if exports:
        for size in sizes:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                print(exports_alone(Path(place), size, rounds), flush=True)
        return
    world = join_world(600)
    for size in sizes:
        model = spec(size)
        engine = trained(model, world)
        background = BackgroundSave(600)
        engine.before_update = background.wait_for_copy
        watch = Watch()
        with tempfile.TemporaryDirectory(dir=folder) as place:
            here = Path(place)
            train_bpe(["one two"], 259).save(here / "tokenizer.json")
            parameters = count_parameters(model).total
            weights, size_bytes = here / "weights", 12 * parameters
            block = torch.ones(BLOCK_BYTES, dtype=torch.uint8).numpy().data
            write_raw(weights, block, 4 * parameters)
            for _ in tqdm(range(rounds), desc=f"{size}M", unit="round", disable=None):
                disk(watch, here, block, size_bytes)
                saved = ours(watch, here, engine, background)
                export_beside_copy(watch, here, model, saved, weights)
                deepspeeds(watch, here, engine)
                shutil.rmtree(saved)
        print("\n".join(table(size, watch, size_bytes, 4 * parameters)), flush=True)
        del engine, background  # before the next one takes its memory
        gc.collect()
    leave_world()


if __name__ == "__main__":
    fire.Fire(main)
