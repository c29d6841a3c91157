"""Peak memory of an export, in a process of its own: `python -m tests.convert.peak_export FOLDER WORD`.

The peak is VmHWM of /proc: that of `getrusage` starts at the size of the process that started this one.
"""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from mosaic_dist.checkpoint import Checkpoint, TensorShard, save
from mosaic_dist.convert import export_checkpoint
from mosaic_dist.convert.hugging_face import export_folder
from mosaic_dist.convert.native import expected_shapes
from mosaic_dist.convert.weights import CheckpointTensors
from mosaic_dist.data.tokenizer import train_bpe
from mosaic_dist.model import GQA, Block, RMSNorm, RoPE, SwiGLU, Transformer, Untied


def spec(dim: int, layers: int) -> Transformer:
    """Matrices of dim * 8 * dim elements, three to a layer, beside two tables of the same size."""
    block = Block(attention=GQA(heads=8, kv_heads=8), ffn=SwiGLU(hidden_dim=8 * dim))
    return Transformer(
        vocab_size=8 * dim,
        dim=dim,
        max_seq_len=64,
        position=RoPE(),
        layers=layers * (block,),
        norm=RMSNorm(),
        head=Untied(),
    )


def write_checkpoint(root: Path, model: Transformer) -> None:
    """Each tensor full of its own number."""
    shapes = expected_shapes(model)
    pieces = [
        TensorShard(name, "master", 0, torch.full(shape, float(i)).flatten())
        for i, (name, shape) in enumerate(shapes.items())
    ]
    save(root, 1, pieces, shapes, {}, {})


def growth_bytes(work: Callable[[], object]) -> int:
    """How far above its memory at the start this process goes while it does some work."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def resident_bytes(what: str) -> int:
    """Resident memory now (VmRSS), or the most that there was (VmHWM)."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def exports(checkpoint: Checkpoint, model: Transformer, folder: Path) -> dict[str, Callable[[], object]]:
    """The kinds of export that are measured."""
    tokenizer = folder / "tokenizer.json"
    return {
        "fp32": lambda: export_checkpoint(checkpoint, model, "m", tokenizer, folder / "fp32", max_shard_bytes=10**8),
        "hf": lambda: export_folder(model, CheckpointTensors(checkpoint), folder / "hf", "fp32", tokenizer),
        "bf16": lambda: export_checkpoint(checkpoint, model, "m", tokenizer, folder / "bf16", "bf16"),
    }


def main(folder: Path, word: str) -> None:
    """`write` makes the checkpoints of a small and a large model; else the kind whose peak is printed.

    The small model is exported before, so that all that an export imports is there.
    """
    large, small = spec(1024, 2), spec(64, 1)
    if word == "write":
        train_bpe(["one two"], 259).save(folder / "tokenizer.json")
        write_checkpoint(folder / "small", small)
        write_checkpoint(folder / "large", large)
        return
    exports(Checkpoint.open(folder / "small" / "step_00000001"), small, folder)[word]()
    shutil.rmtree(folder / word)
    print(growth_bytes(exports(Checkpoint.open(folder / "large" / "step_00000001"), large, folder)[word]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
