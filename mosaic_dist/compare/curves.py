"""The curves of one run or of many in one picture."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import colormaps, ticker

from mosaic_dist.compare.history import Axis, RunHistory, labels
from mosaic_dist.figure import publish, pyplot
from mosaic_dist.train.plot import RUN_INK, Ink, draw_curve, draw_loss, draw_points, measured

FEW = 10
"""So many colours can be told apart by their names; of more, a scale is taken."""
STREAM_LINES = ("-", "--", ":", "-.")
TIME_UNITS = ((2 * 86400.0, 86400.0, "days"), (2 * 3600.0, 3600.0, "hours"), (120.0, 60.0, "minutes"))
"""From so many seconds on, time is told in this unit."""
AXIS_NAMES = {"step": "step", "tokens": "tokens", "flops": "FLOPs of the model, forward and backward"}


class Panel(NamedTuple):
    """What is drawn of each record."""

    title: str
    key: str
    is_smoothed: bool = True
    is_logarithmic: bool = False


FIGURES = (
    Panel("learning rate", "learning_rate", is_smoothed=False),
    Panel("gradient norm before clipping", "grad_norm", is_logarithmic=True),
    Panel("tokens per second", "tokens_per_second"),
    Panel("busiest expert / even share, worst layer", "expert_max_over_mean"),
)
STREAMS = {"epochs of each stream": "epoch/", "validation loss of each stream": "validation_loss/"}
"""Panels of a mixture, by the beginning of their figures' names."""


class Line(NamedTuple):
    """A run on its way into the panels."""

    label: str
    story: RunHistory
    xs: list[float]
    ink: Ink


def draw_curves(stories: Sequence[RunHistory], path: Path, axis: Axis = "step") -> None:
    """Draw what the runs tell as PNG: a panel for each figure that any of them has, a colour for each run."""
    unit, name = axis_unit(axis, max(story.along(axis)[-1] for story in stories))
    inks = [RUN_INK] if len(stories) == 1 else run_inks(len(stories))
    lines = [
        Line(label, story, [x / unit for x in story.along(axis)], ink)
        for label, story, ink in zip(labels(stories), stories, inks, strict=True)
    ]
    panels = list(_panels(lines))
    columns = 2 if len(panels) <= 4 else 3 if len(panels) <= 6 else 4
    rows = math.ceil(len(panels) / columns)
    figure = pyplot.figure(figsize=(5.2 * columns, 3.7 * rows), layout="constrained")
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if i >= len(panels):
            axes.set_axis_off()
            continue
        panels[i](axes)
        axes.set_xlabel(name, fontsize="small")
        axes.grid(alpha=0.3)
        mark_counts(axes.xaxis)
    _name_runs(figure, lines)
    publish(figure, path)


def _panels(lines: Sequence[Line]) -> Iterator[Callable[[Any], None]]:
    """What draws each panel that has something to tell, on its axes."""
    stories = [line.story for line in lines]
    yield partial(_draw_losses, lines=lines)
    for panel in FIGURES:
        if any(story.told(panel.key) for story in stories):
            yield partial(_draw_figure, panel=panel, lines=lines)
    for title, start in STREAMS.items():
        if keys := keys_with(start, stories):
            yield partial(_draw_streams, title=title, keys=keys, lines=lines)
    if any(story.told("validation_exact_match") for story in stories):
        yield partial(_draw_answers, lines=lines)


def axis_unit(axis: Axis, last: float) -> tuple[float, str]:
    """What values on an axis are divided by for a picture that goes up to `last`, and what they are then."""
    if axis != "time":
        return 1.0, AXIS_NAMES[axis]
    unit, name = next(((unit, name) for least, unit, name in TIME_UNITS if last >= least), (1.0, "seconds"))
    return unit, f"{name} of training steps"


def mark_counts(axis: Any) -> None:
    """Let an axis say 20k and 1.5T, but small numbers as they are."""
    large = ticker.EngFormatter(sep="")
    axis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, place: large(x) if abs(x) >= 1000 else f"{x:g}"))


def cut_start(axes: Any, curves: Iterable[Sequence[float]]) -> None:
    """Let the loss axis end where the highest curve is after a tenth of its way: before that all are alike."""
    starts = [curve[len(curve) // 10] for curve in curves]
    low, top = axes.get_ylim()
    highest = max((start for start in starts if math.isfinite(start)), default=top)
    axes.set_ylim(low, min(top, highest + 0.05 * (highest - low)))


def run_inks(count: int) -> list[Ink]:
    """A colour for each of so many runs."""
    scale = colormaps["tab10"] if count <= FEW else colormaps["turbo"].resampled(count)
    colours = [scale(i)[:3] for i in range(count)]
    return [Ink((*colour, 0.25), colour, colour) for colour in colours]


def keys_with(start: str, stories: Sequence[RunHistory]) -> list[str]:
    """The figures of all runs whose names begin so."""
    keys = {key for story in stories for record in story.records for key in record if key.startswith(start)}
    return sorted(keys)


def _draw_losses(axes: Any, lines: Sequence[Line]) -> None:
    for line in lines:
        draw_loss(axes, line.xs, line.story.records, line.ink)
    axes.set_title("loss", fontsize="medium")
    if len(lines) == 1:
        axes.legend(fontsize="small")
    else:
        cut_start(axes, (line.story.column("loss") for line in lines))


def _draw_figure(axes: Any, panel: Panel, lines: Sequence[Line]) -> None:
    for line in lines:
        values = [value if math.isfinite(value) else math.nan for value in line.story.column(panel.key)]
        if panel.is_smoothed:
            draw_curve(axes, line.xs, values, line.ink, panel.title)
        else:
            axes.plot(line.xs, values, color=line.ink.smoothed, linewidth=1.4)
    axes.set_title(panel.title, fontsize="medium")
    if panel.is_logarithmic:
        axes.set_yscale("log")
    else:
        mark_counts(axes.yaxis)


def _draw_streams(axes: Any, title: str, keys: Sequence[str], lines: Sequence[Line]) -> None:
    """A line for each stream: told by its colour in the picture of one run, by its form among several runs."""
    for i, key in enumerate(keys):
        form = STREAM_LINES[i % len(STREAM_LINES)]
        for line in lines:
            if points := measured(line.xs, line.story.records, key):
                colour = f"C{i % FEW}" if len(lines) == 1 else line.ink.smoothed
                axes.plot(*zip(*points, strict=True), form, color=colour, linewidth=1.4)
        key_colour = f"C{i % FEW}" if len(lines) == 1 else "#555555"
        axes.plot([], [], form, color=key_colour, label=key.partition("/")[2])
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small")


def _draw_answers(axes: Any, lines: Sequence[Line]) -> None:
    for line in lines:
        if points := measured(line.xs, line.story.records, "validation_exact_match"):
            draw_points(axes, points, line.ink, line.label, "o-")
    axes.set_title("validation, share answered to the letter", fontsize="medium")
    axes.set_ylim(-0.02, 1.02)


def _name_runs(figure: Any, lines: Sequence[Line]) -> None:
    """The name of the one run above, or the colours of many below."""
    if len(lines) == 1:
        figure.suptitle(lines[0].label)
        return
    for line in lines:
        figure.axes[0].plot([], [], color=line.ink.smoothed, linewidth=1.8, label=line.label)
    handles = figure.axes[0].get_lines()[-len(lines) :]
    longest = max(len(line.label) for line in lines)
    columns = max(1, min(len(lines), 160 // (longest + 6)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
