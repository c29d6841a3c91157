"""What is in a checkpoint, as plain values: read from its manifest, and from the run folder that it lies in."""

import json
import math
from pathlib import Path
from typing import Any

from mosaic_dist.checkpoint.folder import candidates
from mosaic_dist.checkpoint.pieces import CheckpointError
from mosaic_dist.checkpoint.rank_file import DTYPES
from mosaic_dist.checkpoint.reader import Checkpoint

LARGEST_TOLD = 5
UNKNOWN = "unknown"


def checkpoint_facts(checkpoint: Checkpoint, run_folder: Path | None = None) -> dict[str, Any]:
    """Step, tokens, time, layout, sizes by kind, the largest tensors, the position in the data; plain JSON.

    No data is read. Memory and time follow the manifest.
    """
    manifest, state = checkpoint.manifest, checkpoint.state
    kinds: dict[str, dict[str, Any]] = {}
    tensors: list[dict[str, Any]] = []
    for name, tensor in manifest["tensors"].items():
        elements, tensor_bytes = math.prod(tensor["shape"]), 0
        for kind, stored in tensor["kinds"].items():
            size_bytes = elements * DTYPES[stored["dtype"]].itemsize
            tensor_bytes += size_bytes
            row = kinds.setdefault(kind, {"tensors": 0, "elements": 0, "bytes": 0, "dtypes": []})
            row["tensors"] += 1
            row["elements"] += elements
            row["bytes"] += size_bytes
            row["dtypes"] = sorted({*row["dtypes"], stored["dtype"]})
        tensors.append({"name": name, "shape": tensor["shape"], "elements": elements, "bytes": tensor_bytes})
    return {
        "path": str(checkpoint.directory),
        "step": checkpoint.step,
        "tokens": state.get("progress", {}).get("tokens"),
        "time": manifest["time"],
        "versions": manifest["versions"],
        "layout": layout(checkpoint.world_size, run_folder),
        "parameters": kinds.get("master", {}).get("elements", 0),
        "files": len(manifest["files"]),
        "bytes": sum(file["bytes"] for file in manifest["files"]),
        "kinds": dict(sorted(kinds.items())),
        "largest_tensors": sorted(tensors, key=lambda row: -row["bytes"])[:LARGEST_TOLD],
        "data": state.get("data"),
        "progress": state.get("progress"),
        "engine": state.get("engine"),
    }


def layout(ranks: int, run_folder: Path | None) -> dict[str, Any]:
    """Ranks, expert-parallel degree, ZeRO stage and precision of the world that wrote a checkpoint.

    A checkpoint itself knows its ranks only, because it needs no more. The rest is of the run folder's latest start,
    and "unknown" where that had another number of ranks.
    """
    found = {"ranks": ranks, "expert_parallel": UNKNOWN, "zero_stage": UNKNOWN, "precision": UNKNOWN}
    environment = _read(run_folder, "environment.json")
    if environment.get("world_size") != ranks:
        return found
    config = _read(run_folder, "ds_config.json")
    on = [name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")]
    return found | {
        "expert_parallel": environment.get("expert_parallel", UNKNOWN),
        "zero_stage": environment.get("zero_stage", UNKNOWN),
        "precision": (on or ["fp32"])[0] if config else UNKNOWN,
    }


def _read(folder: Path | None, name: str) -> dict[str, Any]:
    try:
        return {} if folder is None else json.loads((folder / name).read_text())
    except (OSError, ValueError):  # a run folder need not be there, nor be whole, for a look at a checkpoint
        return {}


def list_checkpoints(root: Path) -> list[dict[str, Any]]:
    """A row for each checkpoint of a folder, ascending: step, tokens, time, bytes, and what is wrong with it."""
    rows = []
    for step, path in candidates(root).items():
        row: dict[str, Any] = {"step": step, "path": str(path), "problem": None}
        try:
            facts = checkpoint_facts(Checkpoint.open(path))
            row |= {key: facts[key] for key in ("tokens", "time", "bytes")}
        except CheckpointError as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows
