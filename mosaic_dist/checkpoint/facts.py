"""What is in a checkpoint, as plain values, read from its manifest."""

import math
from pathlib import Path
from typing import Any

from mosaic_dist.checkpoint.folder import candidates
from mosaic_dist.checkpoint.rank_file import DTYPES
from mosaic_dist.checkpoint.reader import Checkpoint
from mosaic_dist.checkpoint.tensor_shards import CheckpointError

LARGEST_TOLD = 5
LAYOUT = (
    "ranks",
    "expert_parallel",
    "sequence_parallel",
    "zero_stage",
    "precision",
    "accumulation",
    "micro_batch_size",
)
UNKNOWN = "unknown"
"""Of the layout, in a checkpoint that does not tell it: an older one, or one that no engine saved."""


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
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
        "layout": dict.fromkeys(LAYOUT, UNKNOWN) | {"ranks": checkpoint.world_size} | state.get("layout", {}),
        "parameters": kinds.get("master", {}).get("elements", 0),
        "files": len(manifest["files"]),
        "bytes": sum(file["bytes"] for file in manifest["files"]),
        "kinds": dict(sorted(kinds.items())),
        "largest_tensors": sorted(tensors, key=lambda row: -row["bytes"])[:LARGEST_TOLD],
        "data": state.get("data"),
        "progress": state.get("progress"),
        "engine": state.get("engine"),
    }


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
