"""What every benchmark tells beside its figures: the command, the commit, the hardware, the date; and where both go."""

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mosaic_dist.files import write_atomic


def commit() -> str:
    """The commit that is checked out, short, with a plus where files were changed since."""
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True).stdout.strip()
    return found or "unknown"


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def circumstances(module: str) -> dict[str, Any]:
    """Where and when the figures of `python -m module` are made, as values for JSON."""
    cores, load = os.cpu_count(), os.getloadavg()[0]
    hardware = f"{processor()}, {cores} cores, {torch.get_num_threads()} threads per process, load {load:.1f}"
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.get_device_name()} beside {hardware}"
    return {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "deepspeed": metadata.version("deepspeed"),
        "hardware": hardware,
    }


def heading(title: str, facts: dict[str, Any]) -> str:
    """The first lines of a page of results."""
    return (
        f"# {title}\n\n`{facts['command']}` at commit {facts['commit']}, {facts['date']}, torch {facts['torch']}, "
        f"deepspeed {facts['deepspeed']}, {facts['hardware']}."
    )


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as Markdown, all columns but the first one to the right."""
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_results(output: str, page: str, facts: dict[str, Any], figures: Any) -> None:
    """The page as Markdown in `output`, and the figures with their circumstances beside it as JSON."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, page + "\n")
    write_atomic(Path(output).with_suffix(".json"), json.dumps({**facts, "figures": figures}, indent=1) + "\n")
