"""Run: everything that defines an experiment, in one value."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mosaic_dist.checkpoint.spec import CheckpointPolicy
from mosaic_dist.data import Data
from mosaic_dist.errors import UserError
from mosaic_dist.model import Transformer
from mosaic_dist.optim import BatchRamp, Cosine, Optimizer, Schedule, Spikes
from mosaic_dist.parallel.deepspeed_config import Precision, fill_config
from mosaic_dist.parallel.spec import Parallel
from mosaic_dist.spec import NonNegative, Positive, Spec, SpecError, at, leaves, recipe_asked_for


class Logging(Spec):
    """What is told while training.

    `every_steps` is the interval of metrics and progress, `plot_every_steps` that of the plots (0: at the end only).
    The first record of every `experts_every_steps` steps, and the last of a start, tells what the experts of each layer
    do (0: never); that is about 6 bytes for each expert and 300 for each layer, 37 kB for 36 layers of 128 experts.
    `trackers` get the metrics besides `metrics.jsonl`; W&B runs offline unless WANDB_MODE says otherwise.
    """

    every_steps: Positive = 1
    plot_every_steps: NonNegative = 0
    experts_every_steps: NonNegative = 10
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    project: str = "mosaic_dist"


class Run(Spec):
    """An experiment.

    Each of `steps` updates is over `batch_tokens` tokens, whatever the cluster; every rank takes `micro_batch_size`
    sequences at a time and accumulates the rest. `precision` "auto" means bf16 where the GPU has it, fp16 on older
    ones, fp32 on CPU. `on_nonfinite_loss` says what a NaN or infinite loss does: "stop" the run, or "skip" the step;
    `spikes` what one does that jumps.
    `validate_every_steps` 0 turns validation off. It takes `validation_samples` rows (0: all), evenly over the split;
    `seed` decides which ones. With `exact_match_samples` it also reports the exact-match accuracy on that many rows,
    where the data are questions with an answer each.
    With `early_stopping_patience` the run ends when so many validations in a row have not lowered the best loss (0:
    never). `init_from` is a folder, an exported model of ours or one that transformers saved, whose weights the run
    starts from ("": from `seed`); a run that has a checkpoint goes on from that.

    With a `batch_ramp` the first updates are over fewer tokens, and so is the whole run: `steps` and the schedule count
    updates of any size.
    """

    name: str
    model: Transformer
    data: Data
    optimizer: Optimizer
    schedule: Schedule = Cosine()
    steps: Positive
    batch_tokens: Positive
    batch_ramp: BatchRamp | None = None
    micro_batch_size: Positive = 1
    precision: Precision = "auto"
    seed: NonNegative = 0
    init_from: str = ""
    on_nonfinite_loss: Literal["stop", "skip"] = "stop"
    spikes: Spikes = Spikes()
    validate_every_steps: NonNegative = 0
    validation_samples: NonNegative = 256
    exact_match_samples: NonNegative = 0
    early_stopping_patience: NonNegative = 0
    parallel: Parallel = Parallel()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    logging: Logging = Logging()

    def validate(self) -> None:
        """Sequences fit the model, the batch is made of whole sequences, the warm-up ends before the run."""
        if self.seq_len > self.model.max_seq_len:
            raise SpecError(
                "data.seq_len", f"{self.seq_len} is more than the model's context ({self.model.max_seq_len})"
            )
        if self.batch_tokens % self.seq_len:
            low = self.batch_tokens // self.seq_len * self.seq_len
            raise SpecError(
                "batch_tokens",
                f"{self.batch_tokens} is not a multiple of the sequence length {self.seq_len}; "
                f"nearest: {low or self.seq_len} or {low + self.seq_len}",
            )
        for path, value in (
            ("exact_match_samples", self.exact_match_samples),
            ("early_stopping_patience", self.early_stopping_patience),
            ("checkpoint.keep_best", self.checkpoint.keep_best),
        ):
            if value and not self.validate_every_steps:
                raise SpecError(path, f"{value} needs validation; set validate_every_steps as well")
        if self.spikes.action != "none" and self.spikes.window_steps >= self.steps:
            raise SpecError(
                "spikes.window_steps",
                f"{self.spikes.window_steps} steps of {self.steps}: no step would ever be judged; take fewer",
            )
        if self.spikes.action == "rewind" and self.checkpoint.every_steps >= self.steps:
            raise SpecError(
                "checkpoint.every_steps",
                f"{self.checkpoint.every_steps} is not less than steps ({self.steps}), so there is never a checkpoint "
                "that spikes.action 'rewind' could go back to; save more often, or use 'skip'",
            )
        if self.schedule.warmup_steps > self.steps:
            raise SpecError("schedule.warmup_steps", f"{self.schedule.warmup_steps} is more than steps ({self.steps})")
        if self.batch_ramp is not None:
            with at("batch_ramp"):
                self.batch_ramp.check_run(self.batch_tokens, self.seq_len, self.steps)

    @property
    def seq_len(self) -> int:
        """Tokens per sequence: the data's, or the model's whole context."""
        return self.data.seq_len or self.model.max_seq_len

    @property
    def batch_sequences(self) -> int:
        """Sequences of the global batch; of the full one, if it grows."""
        return self.batch_tokens // self.seq_len

    def sequences_at(self, cursor: int) -> int:
        """Sequences of the global batch that begins behind so many sequences of the run."""
        if self.batch_ramp is None:
            return self.batch_sequences
        return self.batch_ramp.batch_at(cursor * self.seq_len, self.batch_tokens) // self.seq_len

    def tokens_after(self, steps: int) -> int:
        """Tokens that so many steps take, from the run's first on."""
        if self.batch_ramp is None:
            return steps * self.batch_tokens
        return self.batch_ramp.tokens_after(steps, self.batch_tokens)

    def check_ramp(self, world_size: int, cursor: int = 0) -> None:
        """SpecError where a batch that lies ahead of so many sequences cannot be dealt out evenly to the ranks."""
        if self.batch_ramp is not None:
            why = f"which {self.dealt(world_size)} with micro-batches of {self.micro_batch_size} take at a time"
            unit = self.micro_batch_size * (world_size // self.parallel.sequence_parallel) * self.seq_len
            with at("batch_ramp"):
                self.batch_ramp.check_ahead(cursor * self.seq_len, self.batch_tokens, unit, why)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and step. `SpecError` where the batch cannot be dealt out evenly."""
        per_round = self.micro_batch_size * (world_size // self.parallel.sequence_parallel)
        if self.batch_sequences % per_round:
            raise SpecError(
                "batch_tokens",
                f"{self.batch_tokens} tokens are {self.batch_sequences} sequences of {self.seq_len}; "
                f"{self.dealt(world_size)} take micro-batches of {self.micro_batch_size}, that is "
                f"{per_round} sequences at a time, which does not divide them; change batch_tokens, micro_batch_size "
                "or the number of ranks",
            )
        return self.batch_sequences // per_round

    def dealt(self, world_size: int) -> str:
        """Whom the sequences of a batch are dealt out to, for people."""
        shared = self.parallel.sequence_parallel
        return f"{world_size} ranks" if shared == 1 else f"{world_size // shared} groups of {shared} ranks"

    def fill_config(
        self, config: dict[str, Any], precision: Literal["fp32", "bf16", "fp16"], world_size: int
    ) -> dict[str, Any]:
        """A DeepSpeed config with this run's values in it, for so many ranks; see `deepspeed_config.fill_config`."""
        return fill_config(
            config,
            precision=precision,
            micro_batch_size=self.micro_batch_size,
            accumulation=self.accumulation(world_size),
            world_size=world_size,
            max_grad_norm=self.optimizer.max_grad_norm,
        )


ENVIRONMENT_JSON, OWN_PARTS = "environment.json", "own_parts"
"""Next to run.yaml, and the key there: kinds that are not of this package, with the files that define them."""


def read_run(path: Path) -> Run:
    """The run of a run.yaml. UserError that names the file, and for a kind of the recipe's own the recipe."""

    def recipe() -> str:
        return next(iter(recorded(path.parent).get(OWN_PARTS, {}).values()), "FILE")

    try:
        with recipe_asked_for(recipe):
            return Run.from_yaml(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # a UserError, or no text
        raise UserError(f"{path}: {error}") from None


def recorded(folder: Path) -> dict[str, Any]:
    """What a run folder says about the environment and the layout of its last start; nothing where it has no record."""
    file = folder / ENVIRONMENT_JSON
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None


def import_recipe(file: str | None) -> None:
    """Run a recipe's Python file, without its `main`, so that the kinds it defines are known. None: there is none.

    Only a file that the user names is run: a run folder may come from someone else.
    """
    if file is None:
        return
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--recipe {file}: there is no such file")
    if path.stem in sys.modules:
        return
    sys.path.insert(0, str(path.resolve().parent))  # recipes build on each other
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--recipe {file} is not a Python file")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)


MAY_CHANGE = (
    "parallel.",
    "checkpoint.",
    "logging.",
    "data.path",
    "data.cache",
    "data.workers",
    "data.verify",
    "model.loss.chunk_tokens",
    "micro_batch_size",
    "precision",
    "on_nonfinite_loss",
    "spikes.",
)
"""Fields with others of which a run may be continued: they belong to the cluster rather than to the experiment, or say
what becomes of steps that went wrong."""
STREAM_PATH = re.compile(r"data\.streams(\[\d+\])?\.path")
"""So does the place of each stream of a mixture."""


def differences(old: Run, new: Run) -> Iterator[str]:
    """Fields in which two runs are different experiments, as `path: old there, new here`."""
    was, now = dict(_settled(old)), dict(_settled(new))
    for path in sorted(was.keys() | now.keys()):
        if was.get(path, "nothing") != now.get(path, "nothing"):
            yield f"{path}: {was.get(path, 'nothing')!r} there, {now.get(path, 'nothing')!r} here"


def _settled(run: Run) -> Iterator[tuple[str, Any]]:
    yield "model.layers", f"{len(run.model.layers)} layers"  # equal blocks are one leaf each, however many they are
    for path, value in leaves(run):
        if not path.startswith(MAY_CHANGE) and not STREAM_PATH.fullmatch(path):
            yield path, value


SHOWN_DIFFERENCES = 8


def listing(found: Sequence[str]) -> str:
    """Differences as the indented lines that end a message, the first few of them."""
    more = [f"and {len(found) - SHOWN_DIFFERENCES} more"] if len(found) > SHOWN_DIFFERENCES else []
    return "".join(f"\n  {line}" for line in [*found[:SHOWN_DIFFERENCES], *more])
