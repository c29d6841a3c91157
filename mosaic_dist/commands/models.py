"""The commands that make exported models and use them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from mosaic_dist.convert import export_checkpoint, load_exported, parse_size, write_model
from mosaic_dist.convert.hugging_face import SafetensorsFolder, export_folder, how_to_load, import_folder
from mosaic_dist.convert.locate import RUN_YAML, choose_checkpoint
from mosaic_dist.convert.native import read_exported_config
from mosaic_dist.convert.weights import CheckpointTensors
from mosaic_dist.data.tokenizer import FILE_NAMES, Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.generate import Sampling
from mosaic_dist.evaluate.generate import generate as generate_tokens
from mosaic_dist.model import Transformer
from mosaic_dist.run_spec import import_recipe, read_run
from mosaic_dist.spec import NonNegativeFloat, Positive, PositiveFloat, UnitInterval, recipe_asked_for


def export(
    output: str,
    run: str | None = None,
    checkpoint: str | None = None,
    step: Positive | None = None,
    model: str | None = None,
    format: Literal["native", "hf"] = "native",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    max_shard_size: str = "5GB",
    ternary: Literal["float", "packed"] = "float",
    recipe: str | None = None,
) -> None:
    """Write a run's weights as safetensors, with configuration and tokenizer.

    Reads the sharded checkpoint of any cluster shape, on one machine, without DeepSpeed or a GPU. Give --run, or
    --checkpoint, or both where the checkpoint lies elsewhere; or --model with --format hf.

    --output DIR          the exported model; must not exist yet
    --run DIR             the run folder
    --checkpoint DIR      one checkpoint folder; its run's run.yaml is two levels above
    --step N              of --run: a checkpoint other than the newest
    --model DIR           a model that `export` or `import` wrote in the native format
    --format NAME         native, or hf: a folder that transformers' AutoModelForCausalLM loads
    --dtype TYPE          fp32 (as trained), bf16 or fp16
    --max_shard_size SIZE where to cut into several files, as 5GB or 500MB
    --ternary FORM        float, or packed: ternary matrices in 1.6 bits per weight, for native only
    --recipe FILE         the Python file that defines parts of the run's own, if it has any; its code is run
    """
    import_recipe(recipe)
    size = parse_size(max_shard_size)
    if format == "hf" and ternary != "float":
        raise UserError(f"--ternary {ternary} is for --format native; transformers cannot read packed matrices")
    if model is not None:
        if (run, checkpoint, step) != (None, None, None):
            raise UserError("--model cannot be combined with --run, --checkpoint or --step; give one or the others")
        if format != "hf":
            raise UserError(f"--model {model} is in the native format already; --model requires --format hf")
        spec, tensors = _open_exported(Path(model))
        words = Path(model) / "tokenizer.json"
        path = export_folder(spec, tensors, output, dtype, words if words.exists() else None, size)
        print(f"exported {model} to {path}")
    else:
        folder, chosen = choose_checkpoint(run, checkpoint, step)
        described = read_run(folder / RUN_YAML)
        tokenizer = folder / "tokenizer.json"
        if format == "hf":
            path = export_folder(described.model, CheckpointTensors(chosen), output, dtype, tokenizer, size)
        else:
            path = export_checkpoint(chosen, described.model, described.name, tokenizer, output, dtype, size, ternary)
        print(f"exported step {chosen.step} of {described.name} to {path}")
    if format == "hf":
        print(how_to_load(path))


def _open_exported(folder: Path) -> tuple[Transformer, Mapping[str, Tensor]]:
    """The model and the tensors of a folder in the native format."""
    config = read_exported_config(folder)
    if config.get("ternary") == "packed":
        raise UserError(f"{folder} holds packed ternary matrices, which transformers cannot read; export the run")
    with recipe_asked_for():
        return Transformer.from_dict(config["model"]), SafetensorsFolder(folder)


def import_model(
    model: str,
    output: str,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    max_shard_size: str = "5GB",
) -> None:
    """Read a Hugging Face folder and write it as an exported model of ours.

    GPT-2, Llama, Mixtral, Qwen3-MoE, DeepSeek-V3 and GPT-OSS, as unquantised safetensors; and what `export` writes.

    --model DIR           the folder with config.json and safetensors
    --output DIR          the exported model; must not exist yet
    --dtype TYPE          fp32, bf16 or fp16
    --max_shard_size SIZE where to cut into several files, as 5GB or 500MB
    """
    spec, tensors = import_folder(model)
    files = (Path(model) / name for name in FILE_NAMES)
    tokenizer = next((file for file in files if file.exists()), None)
    facts = {"run": Path(model).name, "step": 0}
    path = write_model(output, spec, tensors, facts, tokenizer, dtype, parse_size(max_shard_size))
    print(f"imported {model} to {path}")


def generate(
    model: str,
    prompt: str,
    max_new_tokens: Positive = 100,
    temperature: NonNegativeFloat = 0.8,
    top_k: Positive | None = 50,
    top_p: UnitInterval | None = None,
    repetition_penalty: PositiveFloat = 1.0,
    seed: int = 0,
    recipe: str | None = None,
) -> None:
    """Continue a text with an exported model.

    --model DIR           folder made by `export`
    --prompt TEXT         the beginning
    --max_new_tokens N    how far to go; the end-of-text token, or another end token of the tokenizer, stops earlier
    --temperature X       0 takes the most likely token each time
    --top_k N             draw from the N most likely tokens; None: from all
    --top_p P             draw from the most likely tokens that together have probability P
    --repetition_penalty X  above 1: tokens that were there become less likely
    --seed N              of the draws
    --recipe FILE         the Python file that defines parts of the model's own, if it has any; its code is run
    """
    import_recipe(recipe)
    tokenizer = Tokenizer.load(model)
    network = load_exported(model)
    tokens = tokenizer.encode_prompt(prompt)
    shown = ""
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    for (token,) in generate_tokens(network, [tokens], max_new_tokens, sampling, tokenizer.stop_ids):
        assert token is not None, "a single prompt that has ended yields nothing"
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
