"""`python -m mosaic_dist report`: all that a run tells, on one page."""

import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosaic_dist.compare import page
from mosaic_dist.compare.curves import draw_curves
from mosaic_dist.compare.history import RunHistory, duration, read_history
from mosaic_dist.compare.samples import Samples, write_samples
from mosaic_dist.credentials import mask
from mosaic_dist.errors import UserError
from mosaic_dist.files import check_output_file, write_atomic
from mosaic_dist.spec import NonNegative
from mosaic_dist.train.expert_plot import plot_experts
from mosaic_dist.train.plot import EMA_HALF_LIFE_SHARE, smooth

MIB = 1 << 20


def report(
    *run: str,
    output: str | None = None,
    samples: NonNegative = 3,
    prompt: str = "",
    model: str | None = None,
) -> None:
    """Write all that a run tells as one HTML page: figures, curves, experts, configuration, and texts by the model.

    `report RUN`. The page needs no network and no other file. Texts need the tokenizer in the run's folder.

    --output FILE         the page; default report.html in the folder of the run
    --samples N           how many texts; 0 for none
    --prompt TEXT         what they continue; default the beginning of a document
    --model DIR           whose texts: an exported model; default the run's newest checkpoint
    """
    if len(run) != 1:
        raise UserError("give one run folder, as `report runs/t4_moe`")
    story = read_history(str(run[0]))
    path = Path(output) if output else story.path / "report.html"
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name a file, as {path / 'report.html'}")
    check_output_file(path)
    written = write_samples(story, samples, prompt, model) if samples else None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render(story, written))
    print(f"{path}: {story.run.name} to step {story.records[-1]['step']}")


def render(story: RunHistory, samples: Samples | None) -> str:
    """The page, with what is there."""
    sections = {"Summary": page.table(summarize(story)), **_pictures(story)}
    if samples is not None:
        texts = [page.preformatted(text) for text in samples.texts]
        sections["Samples"] = page.joined([page.paragraph(samples.source), *texts])
    sections["Configuration"] = page.joined(
        [page.folded(name, text) for name in ("run.yaml", "ds_config.json") if (text := _read(story.path / name))]
    )
    if environment := _read(story.path / "environment.json"):
        sections["Environment"] = page.table(_flat(environment, story.path / "environment.json"))
    return page.page(story.run.name, str(story.path.absolute()), sections)


def summarize(story: RunHistory) -> dict[str, str]:
    """The figures of a run, in words."""
    run, last = story.run, story.records[-1]
    speeds, seconds = story.told("tokens_per_second"), story.along("time")[-1]
    ema = smooth(story.column("loss"), max(2.0, EMA_HALF_LIFE_SHARE * len(story.records)))[-1]
    rows = {
        "parameters": f"{story.parameters:,} in all, {story.active_parameters:,} active for a token",
        "steps": f"{last['step']:,} of {run.steps:,}",
        "tokens": f"{last['tokens']:,}",
        "training loss": f"{last['loss']:.4f} at the last step, {ema:.4f} smoothed",
        **_validation(story),
        "time": f"{duration(seconds)} of training steps",
        "tokens per second": f"{statistics.median(speeds):,.0f} (median)" if speeds else "",
        "MFU": f"{statistics.median(told):.1%} (median)" if (told := story.told("mfu")) else "",
        "peak memory": f"{max(told) / MIB:,.0f} MiB of the main process"
        if (told := story.told("memory_bytes"))
        else "",
        "skipped steps": f"{sum(story.told('skipped')):,.0f}",
        "saves": _saves(story),
    }
    return {name: text for name, text in rows.items() if text}


def _validation(story: RunHistory) -> dict[str, str]:
    """The losses and answers on held-out data: the last one, and the best with its step."""
    rows = {}
    losses = [(record["validation_loss"], record["step"]) for record in story.records if "validation_loss" in record]
    if losses:
        best, step = min(losses, key=lambda pair: pair[0] if math.isfinite(pair[0]) else math.inf)
        rows["validation loss"] = f"{losses[-1][0]:.4f} at step {losses[-1][1]:,}, best {best:.4f} at step {step:,}"
    if answered := story.told("validation_exact_match"):
        rows["answers to the letter"] = f"{answered[-1]:.1%}, best {max(answered):.1%}"
    return rows


def _saves(story: RunHistory) -> str:
    seconds, stalls = story.told("save_seconds"), story.told("save_stall_seconds")
    if not seconds:
        return ""
    return f"{len(seconds)}, {statistics.mean(seconds):.2f} s each; training waited {sum(stalls):.2f} s for all of them"


def _pictures(story: RunHistory) -> dict[str, str]:
    """The curves, and what the experts do where there are any."""
    with tempfile.TemporaryDirectory() as name:
        curves, experts = Path(name) / "curves.png", Path(name) / "experts.png"
        draw_curves([story], curves)
        sections = {"Curves": page.picture(curves, f"the curves of {story.run.name} over its steps")}
        if story.experts.steps:
            plot_experts(story.experts, experts, story.run.name)
            sections["Experts"] = page.picture(experts, f"what the experts of {story.run.name} do")
    return sections


def _read(path: Path) -> str:
    """Text of a file, credentials masked; nothing where there is none. A damaged letter does not fail a report."""
    return mask(path.read_text(errors="replace")) if path.exists() else ""


def _flat(text: str, path: Path) -> dict[str, Any]:
    """The facts of environment.json, one below the other."""
    try:
        facts = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; remove it to go on without it") from None
    rows: dict[str, Any] = {}
    for name, value in facts.items() if isinstance(facts, dict) else ():
        rows |= value if isinstance(value, dict) else {name: _words(value)}
    return rows


def _words(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
