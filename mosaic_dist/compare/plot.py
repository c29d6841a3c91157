"""`python -m mosaic_dist plot`: the curves of runs as a picture."""

from pathlib import Path

from mosaic_dist.compare.curves import draw_curves
from mosaic_dist.compare.history import Axis, read_histories
from mosaic_dist.errors import UserError

PICTURE = "curves.png"


def plot(*folders: str, output: str | None = None, x: Axis = "step") -> None:
    """Draw the curves of a run, or of several for comparison, while they train or afterwards.

    `plot DIR_OR_RUN [...]`: run folders, and folders of them. Draws loss (raw, smoothed, on held-out data), learning
    rate, gradient norm, tokens/s, load of the experts, and what a mixture tells of its streams.

    --output FILE         the PNG; default curves.png, in the folder of the run if it is one
    --x AXIS              step, tokens, time (of training steps) or flops (of the model)
    """
    if not folders:
        raise UserError("give a run folder, or several, as `plot runs/t4_moe`")
    stories = [story for folder in folders for story in read_histories(Path(str(folder)))[0]]
    if not stories:
        raise UserError(f"no run in {', '.join(map(str, folders))} has taken a step yet")
    path = Path(output) if output else (stories[0].path if len(stories) == 1 else Path()) / PICTURE
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name a file, as {path / PICTURE}")
    draw_curves(stories, path, x)
    told = [f"{story.run.name} to step {story.records[-1]['step']}" for story in stories]
    print(f"{path}: {', '.join(told)}")
