"""Exported models: a folder with safetensors, the model's configuration and its tokenizer.

config.json                       the model spec, and which run and step it comes from
model.safetensors                 the weights; or model-00001-of-0000N.safetensors and
model.safetensors.index.json      the index, in Hugging Face's form
tokenizer.json
checksums.json                    size and xxh3-128 of every other file
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.errors import UserError
from mosaic_dist.files import checksum, publish_directory, write_atomic
from mosaic_dist.model import Transformer, TransformerModel, materialize

FORMAT_VERSION = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" or "500MB" (powers of ten, as Hugging Face counts)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(KB|MB|GB)\s*", text.upper())
    if not match:
        raise UserError(f"{text!r} is no size; write for example 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def export_checkpoint(
    checkpoint: Checkpoint,
    model: Transformer,
    name: str,
    tokenizer: Path,
    output: str | Path,
    dtype: str = "fp32",
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a checkpoint's weights as an exported model, without ranks, DeepSpeed or a GPU.

    Every tensor that `model` expects must be in the checkpoint with its shape, and none besides. Memory is bounded by
    `max_shard_bytes`, or the largest tensor. The folder appears when it is whole; UserError if it exists.
    """
    output = Path(output)
    if output.exists():
        raise UserError(f"{output} exists already; remove it, or choose another --output")
    expected = expected_shapes(model)
    _check_complete(expected, {key: tuple(shape) for key, shape in checkpoint.shapes.items()})
    aside = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    _write_weights(aside, expected, checkpoint, DTYPES[dtype], max_shard_bytes)
    config = {
        "model_type": "mosaic_dist",
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "run": name,
        "step": checkpoint.step,
        "model": model.to_dict(),
    }
    write_atomic(aside / "config.json", json.dumps(config, indent=2) + "\n")
    shutil.copyfile(tokenizer, aside / "tokenizer.json")
    sums = {file.name: {"bytes": file.stat().st_size, "xxh3_128": checksum(file)} for file in sorted(aside.iterdir())}
    write_atomic(aside / "checksums.json", json.dumps(sums, indent=2) + "\n")
    publish_directory(aside, output)
    return output


def expected_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter and buffer of a model; a shared one once, under its first name."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in _named_tensors(model.build()).items()}


def _named_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _check_complete(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise UserError(
            f"the weights are not this model's: missing {missing[:5] or 'none'}, extra {extra[:5] or 'none'}"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{name} is {found[name]} among the weights, {shape} in the model")


def _write_weights(
    folder: Path, expected: dict[str, tuple[int, ...]], checkpoint: Checkpoint, dtype: torch.dtype, max_bytes: int
) -> None:
    shards = list(_cut(expected, dtype.itemsize, max_bytes))
    weight_map: dict[str, str] = {}
    bar = tqdm(total=len(expected), unit="tensor", desc="export", disable=None)
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            kind = "master" if "master" in checkpoint.kinds(name) else "buffer"
            tensors[name] = checkpoint.read_full(name, kind).to(dtype)
            bar.update()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    bar.close()
    if len(shards) > 1:
        size = sum(torch.Size(shape).numel() for shape in expected.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _cut(shapes: dict[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut where a file would grow beyond `max_bytes`."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        more = torch.Size(shape).numel() * itemsize
        if names and size + more > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def load_exported(path: str | Path) -> TransformerModel:
    """The model of an exported folder, on CPU in its stored dtype, in evaluation mode.

    Raises UserError for a folder that is no export, is damaged, or whose tensors are not its model's.
    """
    path = Path(path)
    if not (path / "config.json").exists() or not (path / "checksums.json").exists():
        raise UserError(f"{path} is no exported model (config.json is missing); make one with `mosaic_dist export`")
    for file, facts in json.loads((path / "checksums.json").read_text()).items():
        if not (path / file).exists() or checksum(path / file) != facts["xxh3_128"]:
            raise UserError(f"{path / file} is missing or damaged: its checksum is not the one written at export")
    config = json.loads((path / "config.json").read_text())
    if config.get("model_type") != "mosaic_dist" or config.get("format_version") != FORMAT_VERSION:
        found = f"{config.get('model_type')!r} version {config.get('format_version')!r}"
        raise UserError(f"{path} holds {found}; this version reads 'mosaic_dist' version {FORMAT_VERSION}")
    spec = Transformer.from_dict(config["model"])
    with torch.device("meta"):
        model = spec.build()
    materialize(model, torch.device("cpu"))
    model = model.to(DTYPES[config["dtype"]])
    with torch.no_grad():
        parameters, seen = _named_tensors(model), {}
        for name, tensor in _read_weights(path):
            seen[name] = tuple(tensor.shape)
            if name in parameters and parameters[name].shape == tensor.shape:
                parameters[name].copy_(tensor)
    _check_complete({name: tuple(parameter.shape) for name, parameter in parameters.items()}, seen)
    return model.eval()


def _read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file} is not a safetensors file: {error}") from None
