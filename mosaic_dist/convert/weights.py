"""Weights on their way to safetensors files: read one by one, cast, cut into files of a bounded size."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.files import write_atomic
from mosaic_dist.model import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class CheckpointTensors(Mapping[str, Tensor]):
    """The weights of a training checkpoint: float32 masters of parameters, and buffers. Read when asked for."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def __getitem__(self, name: str) -> Tensor:
        kind = "master" if "master" in self.checkpoint.kinds(name) else "buffer"
        return self.checkpoint.read_full(name, kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.shapes)

    def __len__(self) -> int:
        return len(self.checkpoint.shapes)


class Mapped(Mapping[str, Tensor]):
    """Tensors with a function of (name, tensor) applied as they are read."""

    def __init__(self, tensors: Mapping[str, Tensor], function: Callable[[str, Tensor], Tensor]):
        self.tensors, self.function = tensors, function

    def __getitem__(self, name: str) -> Tensor:
        return self.function(name, self.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def parameter_cast(spec: Transformer, dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    """Function of (name, tensor) that casts a model's parameters; buffers (DeepSeek's correction) keep their dtype."""
    with torch.device("meta"):
        buffers = {name for name, _ in spec.build().named_buffers()}
    return lambda name, tensor: tensor if name in buffers else tensor.to(dtype)


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> None:
    """Files of at most `max_bytes` (or one tensor), numbered once it is known how many there are."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total_bytes = held_bytes = 0

    def flush() -> None:
        save_file(held, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > max_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
