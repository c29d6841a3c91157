"""Weights on their way to files: read one by one, and cast."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.model import Transformer

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
    """Function of (name, tensor) that casts a model's parameters; buffers (DeepSeek's correction) get the model's."""
    with torch.device("meta"):
        buffers = {name: buffer.dtype for name, buffer in spec.build().named_buffers()}
    return lambda name, tensor: tensor.to(buffers.get(name, dtype))
