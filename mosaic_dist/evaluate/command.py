"""`python -m mosaic_dist evaluate`: one evaluation of one model, or a suite."""

import sys
from json import dumps
from pathlib import Path
from typing import Any

from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.evaluation import Evaluation
from mosaic_dist.evaluate.exact_match import ExactMatch
from mosaic_dist.evaluate.harness import Harness
from mosaic_dist.evaluate.model_source import ModelSource
from mosaic_dist.evaluate.perplexity import Perplexity
from mosaic_dist.evaluate.ranks import meet
from mosaic_dist.evaluate.suite import Suite, render, run_suite
from mosaic_dist.files import check_output_directory, check_output_file, write_atomic
from mosaic_dist.parallel import World, leave_world
from mosaic_dist.run_spec import import_recipe
from mosaic_dist.spec import Positive, SpecError, nearest

FAILED_EXIT_CODE = 1
TASKS = {str(kind.type_name): kind for kind in (ExactMatch, Perplexity, Harness)}


def evaluate(
    model: str | None = None,
    run: str | None = None,
    step: Positive | None = None,
    task: str = "exact_match",
    json_output: str | None = None,
    suite: str | None = None,
    output: str | None = None,
    recipe: str | None = None,
    local_rank: int | None = None,  # the deepspeed launcher's own word; the environment says the same
    **options: Any,
) -> None:
    """Measure a model: questions with one right answer each, perplexity of text, tasks of lm_eval, or a suite of these.

    --model DIR           folder made by `export`, or of Hugging Face
    --run DIR             or a run folder: its newest checkpoint, without an export
    --step N              of --run: a checkpoint other than the newest
    --json_output FILE    where to write the figures
    --recipe FILE         the Python file that defines parts of the model's own, if it has any; its code is run

    --task exact_match    share of answers that are right to the letter, decoding greedily
    --data DIR            dataset made by `python -m data_prep.arithmetic`
    --split NAME          train, validation or test (the default)
    --limit N             the first N questions only
    --samples N           answers to show; 5 by default

    --task perplexity     by a sliding window over each document; under deepspeed or torchrun, ranks share the documents
    --data WHAT           a dataset made by data_prep; a file, folder or glob of texts; stdlib; wikitext2 or another
                          dataset that the package `datasets` loads, as NAME or NAME:CONFIG
    --split NAME          of a dataset; validation by default
    --field NAME          of JSONL, Parquet and datasets; text by default
    --context N           tokens of a window; the model's context by default
    --stride N            from window to window, half of --context by default; each token is scored once and sees at
                          least context - stride tokens before it
    --limit N             the first N documents only
    --batch N             windows at a time; 8 by default
    --dtype TYPE          fp32 (the default) or bf16
    Before each document stands BOS, where the tokenizer asks for one, or else EOS; it is not scored, and neither is the
    EOS behind a document.

    --task lm_eval:NAME   or several, as lm_eval:hellaswag,arc_easy; --model is an export in Hugging Face's form
    --tasks_folder DIR    with YAML files of further tasks
    --shots N             examples before each question; what the task says by default
    --limit N, --batch N, --dtype TYPE as above

    --suite FILE          a YAML file with `evaluations` and, unless --model or --run is given, `models`; see
                          recipes/suites. Exit code 1 if one of them fails; the others are made
    --output DIR          where a suite writes results.md and results.json; evaluations/NAME by default
    """
    import_recipe(recipe)
    subject = read_subject(model, run, step)
    if suite is None:
        if subject is None:
            raise UserError("--model DIR or --run DIR is needed")
        if output is not None:
            raise UserError(f"--output {output} is of --suite; use --json_output FILE")
        evaluation = read_task(task, options)
        if json_output is not None:
            check_output_file(json_output)
        world = meet()
        evaluate_one(evaluation, subject, world, json_output)
        leave_world()
        return
    if options or json_output is not None or task != "exact_match":
        raise UserError("--suite FILE states all evaluations with their options; leave the other flags out")
    stated, folder = read_suite(suite, subject), Path(output or f"evaluations/{Path(suite).stem}")
    check_output_directory(folder)
    world = meet()
    results = run_suite(stated, world, folder)
    if world.is_main:
        print(render(results), end="")
    leave_world()
    if any(result.error is not None for result in results):
        sys.exit(FAILED_EXIT_CODE)


def evaluate_one(evaluation: Evaluation, subject: ModelSource, world: World, json_output: str | None) -> None:
    """Print the figures, and write them to a file if one is named."""
    figures = dumps(evaluation.measure(subject.open(), world), indent=2)
    if world.is_main:
        print(figures)
        if json_output is not None:
            Path(json_output).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(json_output, figures + "\n")


def read_subject(model: str | None, run: str | None, step: int | None) -> ModelSource | None:
    """The model that the flags name; None where they name none."""
    if model is None and run is None and step is None:
        return None
    try:
        return ModelSource(model=model or "", run=run or "", step=step)
    except SpecError as error:
        raise UserError(f"--{error}") from None


def read_task(word: str, options: dict[str, Any]) -> Evaluation:
    """The evaluation that `--task WORD` and the flags describe."""
    kind, _, names = word.partition(":")
    if kind not in TASKS:
        raise UserError(f"--task {word}: no task {kind!r}; {nearest(kind, list(TASKS))}")
    if names and kind != Harness.type_name:
        raise UserError(f"--task {word}: only lm_eval takes names of tasks; write --task {kind}")
    named = {"tasks": names.split(",")} if kind == Harness.type_name else {}
    try:
        return TASKS[kind].from_dict({"type": kind} | options | named)
    except SpecError as error:
        raise UserError(f"--{error}; see `python -m mosaic_dist evaluate --help`") from None


def read_suite(file: str, subject: ModelSource | None) -> Suite:
    """A suite's YAML; `subject` stands for its models."""
    try:
        stated = Suite.from_yaml(Path(file).read_text())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except SpecError as error:
        raise UserError(f"{file}: {error}") from None
    if subject is not None:
        stated = Suite(models=(subject,), evaluations=stated.evaluations)
    if not stated.models:
        raise UserError(f"{file} names no models; add `models`, or give --model DIR or --run DIR")
    return stated
