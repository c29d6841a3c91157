"""What a folder is that somebody names: a run, its checkpoints, one of them, or a model in safetensors files."""

from pathlib import Path
from typing import Literal, NamedTuple

from mosaic_dist.checkpoint import Checkpoint, CheckpointError, candidates, newest
from mosaic_dist.checkpoint.folder import final_path
from mosaic_dist.checkpoint.foreign import refuse_foreign
from mosaic_dist.checkpoint.manifest import MANIFEST_NAME
from mosaic_dist.convert.writing import CHECKSUMS
from mosaic_dist.data.dataset import DATASET_NAME
from mosaic_dist.errors import UserError

RUN_YAML, CHECKPOINTS = "run.yaml", "checkpoints"


class Located(NamedTuple):
    """A folder, and the run folder that it is or lies in, if there is one."""

    path: Path
    kind: Literal["run", "checkpoints", "checkpoint", "model"]
    run: Path | None

    def checkpoints(self) -> list[Path]:
        """All checkpoints of the run, or the one; whole or broken, ascending."""
        if self.kind == "checkpoint":
            return [self.path]
        return list(candidates(self.path / CHECKPOINTS if self.kind == "run" else self.path).values())


def locate(path: str | Path) -> Located:
    """Tell what a folder is. UserError for what is none of these, and for checkpoints of other formats."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no folder; give a run, its checkpoints, one of them, or an exported model")
    if (path / MANIFEST_NAME).exists():
        return Located(path, "checkpoint", run_above(path))
    if (path / RUN_YAML).exists():
        return Located(path, "run", path)
    if (path / DATASET_NAME).exists():
        raise UserError(f"{path} is a dataset; python -m data_prep.inspect_dataset and verify_dataset are for those")
    if (path / "config.json").exists() or (path / CHECKSUMS).exists():
        return Located(path, "model", None)
    if path.name.startswith("step_"):
        raise CheckpointError(f"{path} is not a whole checkpoint: {MANIFEST_NAME} is missing")
    if candidates(path):
        return Located(path, "checkpoints", path.parent if (path.parent / RUN_YAML).exists() else None)
    refuse_foreign(path)
    raise UserError(
        f"{path} is no run ({RUN_YAML}), no folder of checkpoints (step_...), no checkpoint ({MANIFEST_NAME}) and no "
        "exported model (config.json); give one of them"
    )


def run_above(checkpoint: Path) -> Path | None:
    """The run folder of RUN/checkpoints/step_N; None where that has no run.yaml."""
    run = checkpoint.absolute().parent.parent
    return run if (run / RUN_YAML).exists() else None


def choose_checkpoint(run: str | None, checkpoint: str | None, step: int | None) -> tuple[Path, Checkpoint]:
    """The run folder and the checkpoint that the flags of `export` name. UserError for flags that name none."""
    if checkpoint is not None:
        return _given(run, checkpoint, step)
    if run is None:
        raise UserError("--run DIR or --checkpoint DIR is needed")
    folder = _run_folder(Path(run))
    chosen = newest(folder / CHECKPOINTS) if step is None else Checkpoint.open(final_path(folder / CHECKPOINTS, step))
    if chosen is None:
        raise UserError(f"{folder} has no checkpoint yet; train until checkpoint.every_steps, or use --stop_at_step")
    return folder, chosen


def _given(run: str | None, checkpoint: str, step: int | None) -> tuple[Path, Checkpoint]:
    if step is not None:
        raise UserError(f"--step {step} is of --run; --checkpoint {checkpoint} is one step already")
    found = locate(checkpoint)
    if found.kind != "checkpoint":
        raise UserError(f"--checkpoint {checkpoint} is a {found.kind} folder; give one step_..., or use --run")
    folder = found.run if run is None else _run_folder(Path(run))
    if folder is None:
        raise UserError(f"{checkpoint} lies in no run folder ({RUN_YAML} is not two levels above); add --run DIR")
    return folder, Checkpoint.open(checkpoint)


def _run_folder(folder: Path) -> Path:
    if not (folder / RUN_YAML).exists():
        refuse_foreign(folder)
        raise UserError(f"{folder} is no run folder ({RUN_YAML} is missing)")
    return folder
