"""`python -m benchmarks.startup`: from the launch of `t4_moe` to the end of its first step, phase by phase.

The benchmark makes a small dataset, and a launcher starts the recipe on CPU ranks with a small batch, several times.
Told are the seconds of rank 0 by the clock, and of the CPU, which hardly depend on who else uses the machine: the
medians over the rounds. Compiled operations of DeepSpeed would lie in a folder that is empty at the beginning.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.circumstances import circumstances, heading, table, write_results
from benchmarks.startup.picture import draw_phases
from benchmarks.startup.rank import FOLDER, RECIPE, now
from mosaic_dist.cli import run_command
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.sources import read_documents
from mosaic_dist.data.tokenizer import train_bpe
from mosaic_dist.errors import UserError
from mosaic_dist.parallel.world import free_port
from mosaic_dist.spec import Positive

Launcher = Literal["deepspeed", "torchrun"]
MODULE = "benchmarks.startup"
SCRIPT = str(Path(__file__).with_name("rank.py"))
ROOT = Path(__file__).parent.parent.parent
SMALL = "--batch_tokens 2048 --micro_batch_size 2 --steps 1 --schedule.warmup_steps 1 --validate_every_steps 0"
TEXT_BYTES, VOCABULARY = 2_000_000, 1024
LISTED_PACKAGES = 12


class Spent(NamedTuple):
    """What a phase takes of rank 0, or of a launcher's process before there is one."""

    seconds: float
    cpu_seconds: float


def make_data(folder: Path) -> Path:
    """A dataset out of a part of the standard library."""
    documents, size = [], 0
    for text in read_documents(["stdlib"]):
        documents.append(text)
        size += len(text)
        if size > TEXT_BYTES:
            break
    prepare(iter(documents), train_bpe(documents, VOCABULARY), folder / "data", 512, workers=1)
    return folder / "data"


def command(launcher: Launcher, ranks: int) -> list[str]:
    """The words before the script."""
    tool = str(Path(sys.executable).with_name(launcher))
    if launcher == "torchrun":
        return [tool, "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    return [tool, "--num_gpus", str(ranks), "--master_port", str(free_port())]


def start(
    launcher: Launcher, recipe: str, data: Path, folder: Path, ranks: int, words: Sequence[str]
) -> dict[str, Spent]:
    """One start of the recipe in an empty folder; the phases of rank 0, in order."""
    folder.mkdir()
    words_of_run = ["--data", str(data), "--output", str(folder / "run"), *SMALL.split(), *words]
    environment = os.environ | {
        RECIPE: str(Path(recipe).resolve()),
        FOLDER: str(folder),
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(folder.parent / "compiled"),
    }
    launched = now()
    done = subprocess.run(
        [*command(launcher, ranks), SCRIPT, *words_of_run], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{launcher} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return phases(json.loads((folder / "rank_0.json").read_text()), launched)


def phases(told: dict[str, Any], launched: float) -> dict[str, Spent]:
    """From what a rank left: what each phase took, those of the launcher's processes first."""
    processes = sorted(tuple(one) for one in told["ancestors"] if one[0] >= launched - 0.1)
    starts = [launched, *(started for started, _ in processes[1:]), told["started"]]
    found = {
        f"launcher, process {i + 1}": Spent(starts[i + 1] - starts[i], cpu) for i, (_, cpu) in enumerate(processes)
    }
    before, cpu_before = told["started"], 0.0
    for phase, moment, cpu in told["marks"]:
        found[phase] = Spent(moment - before, cpu - cpu_before)
        before, cpu_before = moment, cpu
    return found


def medians(rounds: Sequence[dict[str, Spent]]) -> dict[str, Spent]:
    """By phase, over the rounds."""
    columns = {phase: zip(*(found[phase] for found in rounds), strict=True) for phase in rounds[0]}
    return {phase: Spent(*(statistics.median(column) for column in told)) for phase, told in columns.items()}


def import_seconds(recipe: str) -> Counter[str]:
    """Seconds that the import of a recipe takes in the modules of each top package, by `python -X importtime`."""
    path = Path(recipe).resolve()
    place = {"PYTHONPATH": f"{ROOT}:{path.parent}"}
    words = [sys.executable, "-X", "importtime", "-c", f"import {path.stem}"]
    done = subprocess.run(words, env=os.environ | place, capture_output=True, text=True, check=True)
    return by_package(done.stderr)


def by_package(lines: str) -> Counter[str]:
    """The table of `-X importtime`, summed up by top package."""
    seconds: Counter[str] = Counter()
    for line in lines.splitlines():
        own, _, name = line.removeprefix("import time:").rpartition("|")
        microseconds = own.partition("|")[0].strip()
        if line.startswith("import time:") and microseconds.isdigit():
            seconds[name.strip().partition(".")[0]] += int(microseconds) / 1e6  # type: ignore[assignment]
    return seconds


def startup(
    launchers: Launcher | tuple[Launcher, ...] = ("deepspeed", "torchrun"),
    recipe: str = "recipes/t4_moe.py",
    ranks: Positive = 2,
    rounds: Positive = 3,
    output: str | None = None,
    **overrides: Any,
) -> None:
    """Start a recipe and print what each phase takes until the first step is done.

    Any field of the run is changed by its path, as at its start.

    --launchers NAMES     deepspeed, torchrun, or both
    --recipe FILE         with a `run` and a `main`
    --ranks N             CPU ranks
    --rounds N            starts with each launcher
    --output FILE         where to write the page; JSON and the picture lie beside it
    """
    if not Path(recipe).is_file():
        raise UserError(f"there is no recipe {recipe}")
    found: dict[str, list[dict[str, Spent]]] = {}
    words = [f"--{path}={value}" for path, value in overrides.items()]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = make_data(folder)
        for number in range(rounds):
            for launcher in launchers.split(",") if isinstance(launchers, str) else launchers:
                one = start(launcher, recipe, data, folder / f"{launcher}_{number}", ranks, words)
                found.setdefault(launcher, []).append(one)
        compiled = sorted(path.parent.name for path in (folder / "compiled").rglob("build.ninja"))
    middle = {launcher: medians(starts) for launcher, starts in found.items()}
    packages = import_seconds(recipe)
    facts = circumstances(MODULE)
    text = page(facts, middle, packages, compiled, ranks, rounds)
    print(text)
    if output is not None:
        figures = {name: {p: spent._asdict() for p, spent in told.items()} for name, told in middle.items()}
        write_results(output, text, facts, figures | {"imports": dict(packages.most_common(LISTED_PACKAGES))})
        draw_phases(middle, Path(output).with_suffix(".png"))


def page(
    facts: dict[str, Any],
    found: dict[str, dict[str, Spent]],
    packages: Counter[str],
    compiled: Sequence[str],
    ranks: int,
    rounds: int,
) -> str:
    """The results as Markdown."""
    parts = [heading("From launch to first step", facts)]
    parts.append(f"{ranks} CPU ranks, medians of {rounds} starts. Compiled: {', '.join(compiled) or 'nothing'}.")
    for launcher, told in found.items():
        whole = Spent(*(sum(column) for column in zip(*told.values(), strict=True)))
        rows = [[name, f"{s.seconds:.2f}", f"{s.cpu_seconds:.2f}"] for name, s in (told | {"all": whole}).items()]
        parts.append(table((f"`{launcher}`", "seconds", "CPU seconds"), rows))
    listed = [[name, f"{seconds * 1e3:,.0f}"] for name, seconds in packages.most_common(LISTED_PACKAGES)]
    parts.append(table(("import of the recipe, modules of", "ms"), listed))
    return "\n\n".join(parts)


if __name__ == "__main__":
    run_command(startup, f"python -m {MODULE}")
