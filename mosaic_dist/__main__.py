"""`python -m mosaic_dist COMMAND`: what is done with a run after training."""

from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Any, Literal

from mosaic_dist.cli import run_subcommand
from mosaic_dist.compare.compare import compare
from mosaic_dist.compare.coordinate_check import coordinate_check
from mosaic_dist.compare.find_lr import find_lr
from mosaic_dist.compare.plot import plot
from mosaic_dist.compare.report import report
from mosaic_dist.compare.sweep import sweep
from mosaic_dist.convert import export_checkpoint, load_exported, parse_size, write_model
from mosaic_dist.convert.facts import describe, render
from mosaic_dist.convert.hugging_face import export_folder, how_to_load, import_folder
from mosaic_dist.convert.locate import RUN_YAML, choose_checkpoint, locate
from mosaic_dist.convert.verify import verify as verify_all
from mosaic_dist.convert.weights import CheckpointTensors
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.doctor.command import doctor
from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.command import evaluate
from mosaic_dist.evaluate.generate import Sampling
from mosaic_dist.evaluate.generate import generate as generate_tokens
from mosaic_dist.memory import keep_freed_memory
from mosaic_dist.plan.command import plan
from mosaic_dist.plan.sizes import size_table
from mosaic_dist.profiling.command import profile
from mosaic_dist.reproduce.command import reproduce
from mosaic_dist.run_spec import Run
from mosaic_dist.spec import Fraction, NonNegativeFloat, Positive, PositiveFloat


def export(
    output: str,
    run: str | None = None,
    checkpoint: str | None = None,
    step: Positive | None = None,
    format: Literal["native", "hf"] = "native",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    max_shard_size: str = "5GB",
    ternary: Literal["float", "packed"] = "float",
) -> None:
    """Write a run's weights as safetensors, with configuration and tokenizer.

    Reads the sharded checkpoint of any cluster shape, on one machine, without DeepSpeed or a GPU. Give --run, or
    --checkpoint, or both where the checkpoint lies elsewhere.

    --output DIR          the exported model; must not exist yet
    --run DIR             the run folder
    --checkpoint DIR      one checkpoint folder; its run's run.yaml is two levels above
    --step N              of --run: a checkpoint other than the newest
    --format NAME         native, or hf: a folder that transformers' AutoModelForCausalLM loads
    --dtype TYPE          fp32 (as trained), bf16 or fp16
    --max_shard_size SIZE where to cut into several files, as 5GB or 500MB
    --ternary FORM        float, or packed: ternary matrices in 1.6 bits per weight, for native only
    """
    folder, chosen = choose_checkpoint(run, checkpoint, step)
    described = Run.from_yaml((folder / RUN_YAML).read_text())
    tokenizer = folder / "tokenizer.json"
    size = parse_size(max_shard_size)
    if format == "hf":
        if ternary != "float":
            raise UserError(f"--ternary {ternary} is for --format native; transformers cannot read packed matrices")
        path = export_folder(described.model, CheckpointTensors(chosen), output, dtype, tokenizer, size)
    else:
        path = export_checkpoint(chosen, described.model, described.name, tokenizer, output, dtype, size, ternary)
    print(f"exported step {chosen.step} of {described.name} to {path}")
    if format == "hf":
        print(how_to_load(path))


def inspect(*folder: str, json: bool = False) -> None:
    """Tell what is in a run, its checkpoints, one of them, or an exported model.

    `inspect DIR`: steps, tokens, times, the layout that wrote it, sizes by kind, the largest tensors, the position in
    the data. Reads descriptions and headers only.

    --json                for programs
    """
    facts = describe(locate(_only(folder)))
    print(dumps(facts, indent=2) if json else render(facts))


def verify(*folder: str, threads: Positive = 4) -> None:
    """Read every byte of a run's checkpoints, one of them, or an exported model; fail if any is not as written.

    `verify DIR` ends with exit code 0 only if all is whole: sizes, checksums, every element of every tensor, and the
    tensors of the run's model. A damaged file is named, with what is wrong and which other checkpoint is good.

    --threads N           files that are read at once
    """
    found = locate(_only(folder))
    model = None if found.run is None else Run.from_yaml((found.run / RUN_YAML).read_text()).model
    for path in verify_all(found, model, threads):
        print(f"whole: {path}")


def _only(words: tuple[str, ...]) -> str:
    if len(words) != 1:
        raise UserError(f"give one folder, not {len(words)}: {' '.join(map(str, words))}")
    return str(words[0])


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
    tokenizer = Path(model) / "tokenizer.json"
    facts = {"run": Path(model).name, "step": 0}
    path = write_model(
        output, spec, tensors, facts, tokenizer if tokenizer.exists() else None, dtype, parse_size(max_shard_size)
    )
    print(f"imported {model} to {path}")


def generate(
    model: str,
    prompt: str,
    max_new_tokens: Positive = 100,
    temperature: NonNegativeFloat = 0.8,
    top_k: Positive | None = 50,
    top_p: Fraction | None = None,
    repetition_penalty: PositiveFloat = 1.0,
    seed: int = 0,
) -> None:
    """Continue a text with an exported model.

    --model DIR           folder made by `export`
    --prompt TEXT         the beginning
    --max_new_tokens N    how far to go; the end-of-text token stops earlier
    --temperature X       0 takes the most likely token each time
    --top_k N             draw from the N most likely tokens; None: from all
    --top_p P             draw from the most likely tokens that together have probability P
    --repetition_penalty X  above 1: tokens that were there become less likely
    --seed N              of the draws
    """
    tokenizer = Tokenizer.load(model)
    network = load_exported(model)
    tokens = tokenizer.encode_prompt(prompt)
    shown = ""
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    for (token,) in generate_tokens(network, [tokens], max_new_tokens, sampling, tokenizer.eos_id):
        assert token is not None, "a single prompt that has ended yields nothing"
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


def recipes(folder: str = "recipes") -> None:
    """Print a table of all recipes of a folder with their total and active parameters.

    --folder DIR          where the recipes are
    """
    print(size_table(folder))


def main() -> None:
    """Run the command that the first word names."""
    keep_freed_memory()
    commands: dict[str, Callable[..., Any]] = {
        "export": export,
        "import": import_model,
        "generate": generate,
        "evaluate": evaluate,
        "inspect": inspect,
        "verify": verify,
        "recipes": recipes,
        "plan": plan,
        "doctor": doctor,
        "profile": profile,
        "plot": plot,
        "report": report,
        "sweep": sweep,
        "compare": compare,
        "find_lr": find_lr,
        "coordinate_check": coordinate_check,
        "reproduce": reproduce,
    }
    run_subcommand(commands, "python -m mosaic_dist")


if __name__ == "__main__":
    main()
