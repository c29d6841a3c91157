"""Run folders that nobody has trained: a resolved run, and records that are written down."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosaic_dist.spec import override
from recipes.sweeps.small import run as small

BATCH = small.batch_tokens


def experts(layers: int, busiest: int) -> dict[str, Any]:
    """The figures of layers with four experts, of which the first has so many choices and the others one each."""
    figures = {"load": [busiest, 1, 1, 1], "max_over_mean": 4 * busiest / (busiest + 3), "dead": 0.0, "balance": 1.0}
    return {f"layers.{i}": figures | {"z": 2.0, "entropy": 1.2, "drop_rate": 0.0} for i in range(layers)}


def record(step: int, loss: float, seconds: float = 0.5, **more: Any) -> dict[str, Any]:
    """A record as `reporting.Metrics` writes it."""
    return {
        "step": step,
        "tokens": BATCH * step,
        "loss": loss,
        "auxiliary_loss": 0.0,
        "learning_rate": 1e-3 / step,
        "grad_norm": 1.0 + 1 / step,
        "skipped": False,
        "step_seconds": seconds,
        "data_seconds": 0.01,
        "tokens_per_second": BATCH / seconds,
        "mfu": 0.25,
    } | more


def write_run(folder: Path, records: Sequence[dict[str, Any]], **changes: Any) -> Path:
    """A run folder of the small recipe, with these changes, by their names with __ for the dots."""
    changed = override(small, {"name": folder.name} | {name.replace("__", "."): it for name, it in changes.items()})
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(changed.to_yaml())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder
