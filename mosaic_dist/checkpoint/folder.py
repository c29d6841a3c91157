"""The folder of a run's checkpoints: their names, which are whole, which is the newest, and which may go."""

import os
import re
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path

from mosaic_dist.checkpoint.foreign import refuse_foreign
from mosaic_dist.checkpoint.manifest import refuse_unknown_format
from mosaic_dist.checkpoint.reader import Checkpoint
from mosaic_dist.checkpoint.tensor_shards import CheckpointError, UnknownFormatError
from mosaic_dist.files import remove_directory, sync_directory

_STEP = re.compile(r"step_(\d{8,})")
_RETIRED = re.compile(r"\.(step_\d{8,})\.retired")
_RUBBISH = re.compile(r"\.+step_\d{8,}(\.retired)?\.(tmp|deleting)")


def final_path(root: Path, step: int) -> Path:
    """Folder of a finished checkpoint."""
    return root / f"step_{step:08d}"


def temporary_path(root: Path, step: int) -> Path:
    """Folder of a checkpoint that is being written."""
    return root / f".step_{step:08d}.tmp"


def retired_path(final: Path) -> Path:
    """Where a checkpoint waits while a new one of the same step takes its name; it counts if that never happened."""
    return final.with_name(f".{final.name}.retired")


def sweep(root: Path) -> None:
    """Remove what a crash left behind, and give a retired checkpoint its name back if nothing has taken it.

    One process at a time, and none that saves.
    """
    for path in sorted(root.iterdir()):
        if retired := _RETIRED.fullmatch(path.name):
            if (root / retired[1]).exists():
                remove_directory(path)
            else:
                os.rename(path, root / retired[1])
                sync_directory(root)
        elif _RUBBISH.fullmatch(path.name):
            shutil.rmtree(path)


def candidates(root: str | Path) -> dict[int, Path]:
    """Folders that claim to be checkpoints, whole or broken, by ascending step; empty if `root` does not exist.

    For those who verify every byte before they choose. A retired one is among them only where its name is free. Raises
    CheckpointError where there are only another format's checkpoints: a run must not start over beside them.
    """
    root = Path(root)
    found = {}
    for path in root.iterdir() if root.is_dir() else ():
        if name := _STEP.fullmatch(path.name):
            found[int(name[1])] = path
        elif (retired := _RETIRED.fullmatch(path.name)) and not (root / retired[1]).exists():
            found[int(retired[1].removeprefix("step_"))] = path
    if not found:
        refuse_foreign(root)
    return dict(sorted(found.items()))


def refuse_unknown_formats(root: str | Path) -> None:
    """Raise UnknownFormatError if another version of this package wrote a checkpoint here.

    A run that took an older checkpoint instead would lose steps, and write over what it does not understand.
    """
    for path in candidates(root).values():
        refuse_unknown_format(path)


def steps(root: str | Path) -> list[int]:
    """Steps of all whole checkpoints (those that open), ascending; empty if the folder does not exist.

    Raises UnknownFormatError where one is of another format, as `prune` does.
    """
    return [step for step, path in candidates(root).items() if isinstance(_try_open(step, path), Checkpoint)]


def newest(root: str | Path) -> Checkpoint | None:
    """The newest whole checkpoint; None if there is none at all, whole or broken.

    A newer one that does not open is named in a RuntimeWarning and passed over. Raises CheckpointError if every one is
    broken, because starting over at step zero in silence costs more, and UnknownFormatError if one that is newer than
    all whole ones is of another format. Only reads: all ranks may call it, but let one decide and tell the others the
    step.
    """
    broken: list[CheckpointError] = []
    for step, path in reversed(candidates(root).items()):
        found = _try_open(step, path)
        if isinstance(found, Checkpoint):
            if broken:
                told = "; ".join(map(str, broken))
                warnings.warn(f"using {path}, because newer is broken: {told}", RuntimeWarning, stacklevel=2)
            return found
        broken.append(found)
    if broken:
        raise CheckpointError(f"no whole checkpoint in {root}: {'; '.join(map(str, broken))}")
    return None


def prune(root: str | Path, keep_last: int, protected: Collection[int] = (), keep_every: int = 0) -> list[int]:
    """Delete all checkpoints, whole or broken, that are older than the newest `keep_last` whole ones; returns them.

    Steps that are `protected`, and multiples of `keep_every` (0: none), stay and do not count among the last.
    One process at a time. A crash in the middle leaves no half of a checkpoint under its name. Broken ones newer than
    that stay for a look. Raises ValueError if `keep_last` is below 1.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last ({keep_last}) must be at least 1")
    found = candidates(root)
    mortal = [step for step in found if step not in protected and (not keep_every or step % keep_every)]
    kept = [step for step in mortal if isinstance(_try_open(step, found[step]), Checkpoint)][-keep_last:]
    doomed = {step: found[step] for step in mortal if kept and step < kept[0]}
    for path in doomed.values():
        remove_directory(path)
    return list(doomed)


def _try_open(step: int, path: Path) -> Checkpoint | CheckpointError:
    try:
        checkpoint = Checkpoint.open(path)
    except UnknownFormatError:
        raise
    except CheckpointError as error:
        return error
    if checkpoint.step != step:
        return CheckpointError(f"{path} holds step {checkpoint.step}")
    return checkpoint
