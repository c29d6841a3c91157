"""Checkpoints of other formats: told apart by the names of their files, and refused. Nothing in them is opened."""

import re
from pathlib import Path

from mosaic_dist.checkpoint.tensor_shards import CheckpointError

_DEEPSPEED = re.compile(r".*_(model|optim)_states\.pt")
_ZERO_RANK = re.compile(r"(?:\w+_)?zero_pp_rank_(\d+)_mp_rank_\d+_(model|optim)_states\.pt")
_EXPERT = re.compile(r"(?:layer_\d+_)?expert_(\d+)_mp_rank_\d+_model_states\.pt")
_UNIVERSAL = re.compile(r"zero/[^/]+/fp32\.pt")

_PICKLES = "its files are pickles, which can run code as they are opened"
_ADVICE = (
    "Write the weights as safetensors where they were trained{how}, put the model's config.json beside them, and use "
    "`python -m mosaic_dist import --model FOLDER`, then --init_from to train on"
)


def refuse_foreign(path: Path) -> None:
    """CheckpointError that says what `path`, or a folder in it, is: DeepSpeed's, a universal or a distributed one."""
    for folder in (path, *sorted(child for child in _entries(path) if child.is_dir())):
        names = [child.name for child in _entries(folder)]
        if any(_DEEPSPEED.fullmatch(name) for name in names):
            raise CheckpointError(_deepspeed(folder, names))
        if any(_UNIVERSAL.fullmatch(file.relative_to(folder).as_posix()) for file in folder.glob("zero/*/fp32.pt")):
            told = f"{folder} is a universal checkpoint of DeepSpeed, which is not read: {_PICKLES}"
            raise CheckpointError(f"{told}. {_ADVICE.format(how='')}")
        if ".metadata" in names and any(name.endswith(".distcp") for name in names):
            told = f"{folder} is a checkpoint of torch.distributed.checkpoint, which is not read: its index is a pickle"
            raise CheckpointError(f"{told}. {_ADVICE.format(how='')}")


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _deepspeed(folder: Path, names: list[str]) -> str:
    """What the names of a DeepSpeed checkpoint's files tell, why it is not read, and the way around."""
    zero = [found for name in names if (found := _ZERO_RANK.fullmatch(name))]
    experts = {found[1] for name in names if (found := _EXPERT.fullmatch(name))}
    parts = [f"tag {folder.name}"]
    if zero:
        stage = "stage 3" if any(found[2] == "model" for found in zero) else "stage 1 or 2"
        parts.append(f"ZeRO {stage} of {len({found[1] for found in zero})} ranks")
    if experts:
        parts.append(f"{len(experts)} experts a layer")
    how = f" (`python zero_to_fp32.py {folder.parent} FOLDER --tag {folder.name} --safe_serialization`)"
    bound = "their optimizer states are cut for the ranks that wrote them"
    if experts:
        how = " (load them with the ranks that wrote them, and save the state_dict; zero_to_fp32.py knows no experts)"
        bound = "DeepSpeed's mixtures load only with the ranks and expert parallelism that wrote them"
    return (
        f"{folder} is a checkpoint of DeepSpeed itself ({', '.join(parts)}), which is not read: {_PICKLES}, they have "
        f"no checksums, and {bound}. {_ADVICE.format(how=how)}"
    )
