"""What the kills did, as a table in Markdown."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import deepspeed
import torch

from benchmarks.chaos.campaign import END_SECONDS, EVERY_STEPS, Kill, Outcome, Setting, Story
from benchmarks.chaos.job import ROOT

HEAD = [
    "| checkpoints | killed in | kills | of the whole node | steps lost, mean | most | more than since the last save "
    "| seconds until all ranks were gone, mean | most | and the launcher, mean | most |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
]


def render(outcome: Outcome, setting: Setting, undisturbed: Story, temporary: list[str], seconds: float) -> str:
    """The table with its command, commit and hardware, and the verdict."""
    groups: dict[tuple[str, str], list[Kill]] = {}
    for kill in sorted(outcome.kills, key=lambda kill: (kill.mode, kill.met)):
        groups.setdefault((kill.mode, kill.met), []).append(kill)
    table = HEAD + [row(*names, kills) for names, kills in groups.items()]
    if outcome.kills:
        table.append(row("all", "", outcome.kills))
    left = Counter(name.partition("_")[0] for name in temporary)
    load = statistics.mean(kill.load for kill in outcome.kills) if outcome.kills else 0.0
    steps = undisturbed[-1]["step"] if undisturbed else 0
    return (
        "# Training that is killed at random moments\n\n"
        f"`python -m benchmarks.chaos {' '.join(sys.argv[1:])}` at {version()}, {time.strftime('%Y-%m-%d')}, torch "
        f"{torch.__version__}, deepspeed {deepspeed.__version__}, {hardware()}; {seconds / 60:.0f} minutes. Each run "
        f"has {steps} steps on {setting.ranks} ranks with a checkpoint every {EVERY_STEPS} steps, of which the newest "
        f"is kept; started by {' and '.join(setting.launchers)} in turn. "
        f"Others used the machine at the same time: {load:.0f} processes wanted to run on average.\n\n"
        + "\n".join(table)
        + f"\n\n{verdict(outcome, steps)}\n\n"
        + f"Left among the temporary files of {outcome.starts} starts: "
        f"{', '.join(f'{count} {name}' for name, count in left.items()) or 'nothing'}.\n"
    )


def row(mode: str, met: str, kills: list[Kill]) -> str:
    """The line of a group of kills."""
    lost, ranks = [kill.lost_steps for kill in kills], [kill.ending.ranks_seconds for kill in kills]
    seconds = [kill.ending.seconds for kill in kills]
    return (
        f"| {mode} | {met} | {len(kills)} | {sum(kill.victims > 1 for kill in kills)} | {statistics.mean(lost):.1f} "
        f"| {max(lost)} | {sum(kill.lost_too_many for kill in kills)} | {statistics.mean(ranks):.1f} "
        f"| {max(ranks):.1f} | {statistics.mean(seconds):.1f} | {max(seconds):.1f} |"
    )


def verdict(outcome: Outcome, steps: int) -> str:
    """All is well, or what is not."""
    if outcome.problems:
        return "Not as it must be:\n\n" + "\n".join(f"- {problem}" for problem in outcome.problems)
    too_many = sum(kill.lost_too_many for kill in outcome.kills)
    return (
        f"{too_many} of {len(outcome.kills)} kills lost more than the steps since the last save. In all {steps} steps, "
        "losses, gradient norms, learning rates and token counts are bitwise those of the run that nobody disturbed, "
        "and so is every byte of the last checkpoint. Every start went on from the newest checkpoint, no checkpoint "
        f"was damaged, all ranks and readers of a job were gone within {END_SECONDS:.0f} s, and nothing was left "
        "behind: no process, no file in the run folder, nothing in /dev/shm."
    )


def version() -> str:
    """The commit, and what was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout

    changed = git("diff", "--name-only", "HEAD", "--", "*.py").split()
    more = f" with changes in {', '.join(changed)}" if changed else ""
    return f"commit {git('rev-parse', '--short', 'HEAD').strip()}{more}"


def hardware() -> str:
    """What this ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} cores of {name}"
