"""Folders in Hugging Face's form: config.json, model.safetensors or shards with an index, tokenizer.json."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from mosaic_dist.checkpoint.foreign import refuse_foreign
from mosaic_dist.convert.hugging_face.architectures import (
    config_for,
    spec_from_config,
    weights_to_hugging_face,
    weights_to_ours,
    why_no_architecture,
)
from mosaic_dist.convert.hugging_face.gpt2 import EOS_ROLES
from mosaic_dist.convert.hugging_face.standalone import CODE, MODEL_TYPE, source_code
from mosaic_dist.convert.native import expected_tensors
from mosaic_dist.convert.reading import open_safetensors, prove_files, read_json, read_weight_map
from mosaic_dist.convert.weights import DTYPES, Mapped, parameter_cast
from mosaic_dist.convert.writing import write_checksums, write_weights
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.files import check_new_directory, publish_directory, write_atomic
from mosaic_dist.model import Transformer

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


# --- in -----------------------------------------------------------------------------------------------------------


def import_folder(path: str | Path, prove: bool = True) -> tuple[Transformer, Iterator[tuple[str, Tensor]]]:
    """The model of a Hugging Face folder and its tensors under our names, read as they are asked for.

    Where the folder has checksums, as our exports do, its files are hashed first, unless the caller does that itself
    (`prove=False`).

    UserError for a folder without config.json or safetensors, a setting that we cannot represent, files of another
    model, and tensors that are missing, left over, damaged or of another shape.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        refuse_foreign(path)
        raise UserError(f"{path} is no Hugging Face model: it has no config.json")
    config, tensors = read_json(path / "config.json"), SafetensorsFolder(path)
    if prove:
        prove_files(path)
    return spec_from_config(config), weights_to_ours(config, tensors)


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a folder by name; each is read from its file when it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.files = read_weight_map(path)

    def __getitem__(self, name: str) -> Tensor:
        file = self.path / self.files[name]
        with open_safetensors(file) as opened:
            try:
                return opened.get_tensor(name)
            except SafetensorError as error:
                raise UserError(f"{file} does not give {name}, which the index places there: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


# --- out ----------------------------------------------------------------------------------------------------------


def export_folder(
    spec: Transformer,
    tensors: Mapping[str, Tensor],
    output: str | Path,
    dtype: str = "bf16",
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads. It appears when it is whole.

    A model that no architecture of transformers computes brings its code along (see `standalone.py`).
    `tensors` (see `CheckpointTensors`) are read one after another, so memory is bounded by two of the largest, such as
    one layer's stack of experts. Parameters are cast to `dtype`; buffers (DeepSeek's correction) keep theirs. With
    checksums of all files. UserError if the output exists, tensors are not the model's, or the tokenizer has more
    tokens than it.
    """
    output = Path(output)
    check_new_directory(output)
    if dtype not in DTYPES:
        raise UserError(f"no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    words = None if tokenizer is None else Tokenizer.load(tokenizer)
    if words is not None and words.vocab_size > spec.vocab_size:
        raise UserError(
            f"{tokenizer} has {words.vocab_size} tokens, more than the model's vocabulary ({spec.vocab_size})"
        )
    config = config_for(spec) | _special_tokens(words) | {"torch_dtype": DTYPE_NAMES[dtype]}
    code = source_code(spec) if config["model_type"] == MODEL_TYPE else None
    cast = parameter_cast(spec, DTYPES[dtype])
    planned, converted = (
        weights_to_hugging_face(spec, Mapped(source, cast), config) for source in (expected_tensors(spec), tensors)
    )
    aside = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    known = write_weights(aside, planned, converted, max_shard_bytes)
    _write_json(aside / "config.json", config)
    if code is not None:
        write_atomic(aside / f"{CODE}.py", code)
    if words is not None:
        words.save(aside, spec.max_seq_len, EOS_ROLES if config["model_type"] == "gpt2" else ())
    write_checksums(aside, known)
    publish_directory(aside, output)
    return output


def how_to_load(path: str | Path) -> str:
    """What to tell the user of a folder that `export_folder` wrote: its architecture, and the words that load it.

    For a model with its own code also which part does not fit each architecture.
    """
    config = read_json(Path(path) / "config.json")
    if config["model_type"] != MODEL_TYPE:
        return f"as {config['model_type']}: AutoModelForCausalLM.from_pretrained({str(path)!r})"
    return (
        f"{why_no_architecture(spec_from_config(config))}\n"
        f"with its own code, {CODE}.py: AutoModelForCausalLM.from_pretrained({str(path)!r}, trust_remote_code=True)"
    )


def _special_tokens(words: Tokenizer | None) -> dict[str, Any]:
    """Ids for config.json, always written: transformers' defaults are those of other models' tokenizers."""
    if words is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return words.special_ids()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_atomic(file, json.dumps(content, indent=2) + "\n")
