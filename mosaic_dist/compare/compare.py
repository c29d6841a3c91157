"""`python -m mosaic_dist compare`: variants beside each other, as a table and a picture."""

from pathlib import Path

from mosaic_dist.compare.comparison import draw_comparison, render
from mosaic_dist.compare.history import RunHistory, read_histories
from mosaic_dist.compare.measures import compare_variants, group
from mosaic_dist.errors import UserError
from mosaic_dist.files import write_atomic

NAME = "comparison"


def compare(*folders: str, output: str | None = None, baseline: str | None = None) -> None:
    """Compare runs: losses with their spread over seeds, speed, size, memory, and losses at equal tokens, FLOPs, time.

    `compare DIR_OR_RUN [...]`: run folders, and folders of them such as a sweep makes. Runs that differ in nothing but
    the seed are one variant. Prints the table, and writes it beside a picture.

    --baseline NAME       the variant that the others are set against, seed by seed; default the first
    --output DIR          where comparison.md and comparison.png go; default the one folder that is given, or here
    """
    if not folders:
        raise UserError("give run folders, or a folder of them, as `compare runs/attention`")
    stories: list[RunHistory] = []
    left_out: list[str] = []
    for folder in map(str, folders):
        found, silent = read_histories(Path(folder))
        stories += found
        left_out += silent
    if not stories:
        raise UserError(f"no run has told anything yet: {', '.join(left_out)}")
    notes = [f"Left out, without a step so far: {', '.join(left_out)}."] if left_out else []
    comparison = compare_variants(group(stories), baseline)
    text = render(comparison, notes)
    path = Path(output) if output else Path(str(folders[0])) if len(folders) == 1 else Path()
    draw_comparison(comparison, path / f"{NAME}.png")
    write_atomic(path / f"{NAME}.md", text)
    print(f"{text}\n{path / f'{NAME}.md'}, {path / f'{NAME}.png'}")
