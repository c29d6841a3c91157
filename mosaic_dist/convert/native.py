"""Exported models: a folder with safetensors, the model's configuration and its tokenizer.

config.json                       the model spec, and which run and step it comes from
model.safetensors                 the weights; or model-00001-of-0000N.safetensors and
model.safetensors.index.json      the index, in Hugging Face's form; ternary matrices may be packed (`packed.py`)
tokenizer.json, tokenizer_config.json, and with several end tokens generation_config.json
checksums.json                    size and xxh3-128 of every other file
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mosaic_dist.checkpoint import Checkpoint
from mosaic_dist.convert.packed import freeze, pack, plan, ternary_weights, unpack
from mosaic_dist.convert.reading import open_safetensors, prove_files, read_json, read_weight_map
from mosaic_dist.convert.weights import DTYPES, CheckpointTensors, parameter_cast
from mosaic_dist.convert.writing import CHECKSUMS, write_checksums, write_weights
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.files import check_new_directory, publish_directory, write_atomic
from mosaic_dist.model import Transformer, TransformerModel, materialize
from mosaic_dist.spec import recipe_asked_for

FORMAT_VERSION = 1
Ternary = Literal["float", "packed"]
"""How ternary matrices are written: the weights that training went on with, or what products see of them."""
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
    ternary: Ternary = "float",
) -> Path:
    """Write a checkpoint's weights as an exported model, without ranks, DeepSpeed or a GPU.

    Every tensor that `model` expects must be in the checkpoint with its shape, and none besides. Memory is bounded by
    two of the largest tensors. The folder appears when it is whole; UserError if it exists.
    """
    expected = expected_shapes(model)
    check_complete(expected, {key: tuple(shape) for key, shape in checkpoint.shapes.items()})
    tensors = CheckpointTensors(checkpoint)
    facts = {"run": name, "step": checkpoint.step}
    named = ((key, tensors[key]) for key in expected)
    return write_model(output, model, named, facts, tokenizer, dtype, max_shard_bytes, ternary)


def write_model(
    output: str | Path,
    model: Transformer,
    tensors: Iterable[tuple[str, Tensor]],
    facts: dict[str, Any],
    tokenizer: Path | None,
    dtype: str = "fp32",
    max_shard_bytes: int = 5 * 10**9,
    ternary: Ternary = "float",
) -> Path:
    """Write tensors by our names as an exported model; parameters are cast, buffers stay. `facts` tell their origin.

    With `ternary` "packed" (see `packed.py`) the model gives the logits of the "float" form in fp32, and in another
    dtype those of the packed fp32 model cast to it. The folder appears when it is whole; UserError if it exists, and
    if nothing can be packed.
    """
    output = Path(output)
    check_new_directory(output)
    words = None if tokenizer is None else Tokenizer.load(tokenizer)
    planned = planned_tensors(model, dtype, ternary)
    packed = ternary_weights(_on_meta(model)) if ternary == "packed" else {}
    aside = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    cast = pack(tensors, packed, parameter_cast(model, DTYPES[dtype]))
    known = write_weights(aside, planned, cast, max_shard_bytes)
    config = {
        "model_type": "mosaic_dist",
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "ternary": ternary,
        **facts,
    }
    write_atomic(aside / "config.json", json.dumps(config | {"model": model.to_dict()}, indent=2) + "\n")
    if words is not None:
        words.save(aside)
    write_checksums(aside, known)
    publish_directory(aside, output)
    return output


def planned_tensors(model: Transformer, dtype: str, ternary: Ternary) -> list[tuple[str, Tensor]]:
    """What an exported model holds, without data: names, shapes and dtypes. UserError if nothing can be packed."""
    on_meta = _on_meta(model)
    packed = ternary_weights(on_meta) if ternary == "packed" else {}
    return list(plan(_named_tensors(on_meta).items(), packed, parameter_cast(model, DTYPES[dtype])))


def expected_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every parameter and buffer of a model, without data (on the meta device); a shared one under its first name."""
    return _named_tensors(_on_meta(model))


def expected_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter and buffer of a model; a shared one once, under its first name."""
    return {name: tuple(tensor.shape) for name, tensor in expected_tensors(model).items()}


def _on_meta(model: Transformer) -> TransformerModel:
    with torch.device("meta"):
        return model.build()


def _named_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def check_complete(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """UserError unless the weights `found` are the model's, each in its shape, and none besides."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise UserError(
            f"the weights are not this model's: missing {missing[:5] or 'none'}, extra {extra[:5] or 'none'}"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{name} is {found[name]} among the weights, {shape} in the model")


def read_exported_config(path: Path) -> dict[str, Any]:
    """config.json of an exported model. UserError for a folder that is none, or has a file that is damaged."""
    if not (path / "config.json").exists() or not (path / CHECKSUMS).exists():
        raise UserError(
            f"{path} is no exported model (config.json or {CHECKSUMS} is missing); make one with `mosaic_dist export`"
        )
    prove_files(path)
    config = read_json(path / "config.json")
    if config.get("model_type") != "mosaic_dist" or config.get("format_version") != FORMAT_VERSION:
        found = f"{config.get('model_type')!r} version {config.get('format_version')!r}"
        raise UserError(f"{path} holds {found}; this version reads 'mosaic_dist' version {FORMAT_VERSION}")
    return config


def load_exported(path: str | Path) -> TransformerModel:
    """The model of an exported folder, on CPU in its stored dtype, in evaluation mode.

    Raises UserError for a folder that is no export, is damaged, or whose tensors are not its model's.
    """
    path = Path(path)
    config = read_exported_config(path)
    with recipe_asked_for():
        model, dtype = _on_meta(Transformer.from_dict(config["model"])), DTYPES[config["dtype"]]
    materialize(model, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    tensors = _read_weights(path / file for file in sorted(set(read_weight_map(path).values())))
    if config.get("ternary") == "packed":
        tensors = unpack(tensors, ternary_weights(model), dtype)
        freeze(model)
    with torch.no_grad():
        parameters, seen = _named_tensors(model), {}
        for name, tensor in tensors:
            seen[name] = tuple(tensor.shape)
            if name in parameters and parameters[name].shape == tensor.shape:
                parameters[name].copy_(tensor)
    check_complete({name: tuple(parameter.shape) for name, parameter in parameters.items()}, seen)
    return model.eval()


def _read_weights(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with open_safetensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield name, opened.get_tensor(name)
