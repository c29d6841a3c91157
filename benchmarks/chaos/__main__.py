"""Kill a training run with SIGKILL at random moments, start it again each time, and compare what comes out.

`python -m benchmarks.chaos --kills 60` prepares a small corpus and trains a tiny mixture of experts (expert parallel,
ZeRO-2, two readers of data per rank): once undisturbed, then with kills in two further folders at once, in one of which
it saves while it trains and in the other waits for each save. Kills are aimed at the start-up, at the reading of data,
at steps, at saves and at the deletion of old checkpoints. Exit code 1 if anything is not as it must be.
"""

import math
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from random import Random

from tqdm import tqdm

from benchmarks.chaos.aim import MOMENTS
from benchmarks.chaos.campaign import (
    ENDS_IN_A_ROW,
    EVERY_STEPS,
    LEAST_STEPS,
    STEPS_PER_KILL,
    Campaign,
    Kill,
    Outcome,
    Setting,
    story,
)
from benchmarks.chaos.job import LAUNCHERS, temporary_files
from benchmarks.chaos.report import render
from data_prep.tokenize_to_mds import tokenize_to_mds
from data_prep.train_tokenizer import train_tokenizer
from mosaic_dist.cli import run_command
from mosaic_dist.errors import UserError
from mosaic_dist.files import write_atomic
from mosaic_dist.spec import NonNegative, Positive, PositiveFloat

VOCABULARY, CONTEXT = 512, 32
TOKENIZER_BYTES = 2_000_000
TINY = (
    f"--ds_config ds_configs/zero2.json --model.vocab_size {VOCABULARY} --model.max_seq_len {CONTEXT} --model.dim 32 "
    "--model.embedding.rank 16 --model.layers.attention.heads 2 --model.layers.ffn.expert.hidden_dim 64 "
    "--model.layers.ffn.experts 4 --model.layers.ffn.split 4 --batch_tokens 256 --micro_batch_size 4 "
    "--schedule.warmup_steps 2 --optimizer.learning_rate 1e-2 --validate_every_steps 30 --validation_samples 8 "
    f"--data.workers 2 --checkpoint.every_steps {EVERY_STEPS} --checkpoint.keep_last 1"
).split()
"""`t4_moe` with its four blocks and all its parts, but tiny. At each save an old checkpoint is deleted."""
MODES = {False: "synchronous", True: "asynchronous"}


def chaos(
    kills: Positive = 60,
    ranks: Positive = 2,
    seed: NonNegative = 0,
    launcher: str | tuple[str, ...] = ("deepspeed", "torchrun"),
    asynchronous: bool | None = None,
    max_minutes: PositiveFloat | None = None,
    input: str = "stdlib",
    work: str | None = None,
    output: str | None = None,
) -> None:
    """Kill a run so many times at random moments and check that nothing is lost that was saved.

    --launcher NAMES     deepspeed, torchrun, or both: in turn
    --asynchronous BOOL  how checkpoints are written; without it, half of the kills each
    --max_minutes N      nobody is killed later than that
    --input WHAT         the corpus: a folder of text, or stdlib
    --work DIR           where runs and logs go, an empty folder; without it one that is removed if all is well
    --output FILE        write the table there as well, as Markdown
    """
    launchers = launcher.split(",") if isinstance(launcher, str) else launcher
    if unknown := set(launchers) - set(LAUNCHERS):
        raise UserError(f"--launcher {','.join(sorted(unknown))}: known are {', '.join(LAUNCHERS)}")
    folder = Path(work or tempfile.mkdtemp(prefix="chaos_")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    modes = [False, True] if asynchronous is None else [asynchronous]
    started = time.monotonic()
    words = prepare(folder, input, -(-kills // len(modes)))
    deadline = math.inf if max_minutes is None else started + 60 * max_minutes
    outcome = run_all(setting := Setting(launchers, ranks, words, folder, deadline), modes, kills, seed)
    temporary = sorted(path.name for path in temporary_files(folder).iterdir())
    text = render(outcome, setting, story(folder / "undisturbed"), temporary, time.monotonic() - started)
    print(text)
    if output:
        write_atomic(output, text)
    if outcome.problems:
        print(f"logs and run folders: {folder}", file=sys.stderr)
        sys.exit(1)
    if work is None:
        shutil.rmtree(folder)


def prepare(folder: Path, source: str, kills: int) -> list[str]:
    """Make tokenizer and dataset; the recipe's words for a run that is long enough for so many kills."""
    tokenizer, data = folder / "tokenizer.json", folder / "data"
    train_tokenizer(input=source, vocab_size=VOCABULARY, max_bytes=TOKENIZER_BYTES, output=str(tokenizer))
    tokenize_to_mds(
        input=source, tokenizer=str(tokenizer), output=str(data), seq_len=CONTEXT, validation_fraction=0.1, workers=1
    )
    return [*TINY, "--data", str(data), "--steps", str(max(LEAST_STEPS, STEPS_PER_KILL * kills))]


def run_all(setting: Setting, modes: list[bool], kills: int, seed: int) -> Outcome:
    """The undisturbed run, and then as many disturbed ones as it takes, one of each mode at a time."""
    outcome = Outcome()
    undisturbed = Campaign(setting, "undisturbed", ["--checkpoint.asynchronous", "False"], Random(seed), outcome)
    undisturbed.finish()
    if outcome.problems:
        return outcome
    with tqdm(total=kills, desc="kills") as bar, ThreadPoolExecutor(len(modes)) as threads:

        def tell(kill: Kill) -> None:
            bar.update()
            bar.write(str(kill), file=sys.stderr)

        def disturb(mode: bool, kills: int) -> None:
            chance = Random(f"{seed} {mode}")
            moments = deal(kills, chance)
            ends = 0
            while moments and not outcome.problems and not setting.is_over:
                before, name = len(moments), f"{MODES[mode]}_{len(moments)}_{ends}"
                campaign = Campaign(setting, name, ["--checkpoint.asynchronous", str(mode)], chance, outcome)
                campaign.disturb(moments, story(undisturbed.folder), tell)
                campaign.finish()
                campaign.compare(undisturbed.folder)
                ends = ends + 1 if len(moments) == before else 0
                if ends == ENDS_IN_A_ROW:
                    outcome.problems.append(f"{ENDS_IN_A_ROW} runs ended before they could be killed: {moments[0]}")

        shares = [kills // len(modes) + (index < kills % len(modes)) for index in range(len(modes))]
        list(threads.map(disturb, modes, shares))
    return outcome


def deal(kills: int, chance: Random) -> list[str]:
    """Every moment equally often, in an order that is random in each round."""
    rounds = (chance.sample(MOMENTS, len(MOMENTS)) for _ in range(0, kills, len(MOMENTS)))
    return list(chain.from_iterable(rounds))[:kills]


if __name__ == "__main__":
    run_command(chaos, "python -m benchmarks.chaos")
