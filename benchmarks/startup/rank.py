"""The script that the launcher starts in place of a recipe: the recipe itself, with a mark at the end of each phase.

The recipe and the folder for the marks are in the environment, the words are the recipe's. Imports are made one package
after the other, so that each is told by itself.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

RECIPE, FOLDER = "STARTUP_RECIPE", "STARTUP_FOLDER"
marks: list[tuple[str, float, float]] = []
"""Phase, the moment of its end on the clock of all processes, and CPU seconds of this process up to then."""


def now() -> float:
    """Seconds since the machine was started, which /proc tells of processes as well."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def mark(phase: str) -> None:
    """A phase has ended."""
    marks.append((phase, now(), time.process_time()))


def wrap(owner: Any, name: str, before: str | None = None, after: str | None = None) -> None:
    """Let the first call of a function end one phase when it begins, and another one when it returns."""
    original = getattr(owner, name)

    def marked(*words: Any, **named: Any) -> Any:
        setattr(owner, name, original)
        if before is not None:
            mark(before)
        result = original(*words, **named)
        if after is not None:
            mark(after)
        return result

    setattr(owner, name, marked)


def process_facts(process: int) -> tuple[int, float, float]:
    """Parent, moment of the start and CPU seconds of a process."""
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return int(words[1]), int(words[19]) / ticks, (int(words[11]) + int(words[12])) / ticks


def ancestors() -> list[tuple[float, float]]:
    """Start and CPU seconds of this process's parent, of its parent, and so on."""
    process, found = os.getppid(), []
    while process > 1:
        parent, started, cpu = process_facts(process)
        found.append((started, cpu))
        process = parent
    return found


def watch_phases() -> None:
    """Put marks around what a start of a run does, in the order in which it does it."""
    import deepspeed

    import mosaic_dist.run as run
    from mosaic_dist.parallel import Engine
    from mosaic_dist.train import session, trainer

    wrap(run, "join_world", "flags, model's size, data's description", "rendezvous")
    wrap(session, "Engine", "run folder")
    wrap(deepspeed, "initialize", "model", "DeepSpeed engine")
    wrap(session, "begin", after="checkpoint, data")
    wrap(trainer.Trainer, "train", "metrics, trackers")
    wrap(Engine, "train_step", "first batch", "first step")


def main() -> None:
    """Run the recipe, and leave the marks of this rank."""
    mark("Python")
    began: dict[str, Any] = {"started": process_facts(os.getpid())[1], "ancestors": ancestors()}
    import torch

    mark("import torch")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as ours do before they import it
    import deepspeed  # noqa: F401 - only for its time

    mark("import deepspeed")
    recipe = Path(os.environ[RECIPE])
    sys.path.insert(0, str(recipe.parent))
    module: Any = importlib.import_module(recipe.stem)
    mark("import ours")
    watch_phases()
    sys.argv[0] = str(recipe)
    module.main(module.run)
    path = Path(os.environ[FOLDER], f"rank_{os.environ['RANK']}.json")
    path.write_text(json.dumps(began | {"marks": marks}))


if __name__ == "__main__":
    main()
