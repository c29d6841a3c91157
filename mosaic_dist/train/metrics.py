"""metrics.jsonl: one JSON object per logged step, in order of steps."""

import json
from pathlib import Path
from typing import Any

from mosaic_dist.files import write_atomic


class MetricsFile:
    """Append-only record of a run. Opened for a run that continues at `step`, it drops what lies beyond.

    Fields of a record: `step` (updates done), `tokens` (seen so far), `loss` (mean cross-entropy in nats),
    `auxiliary_loss`, `learning_rate`, `grad_norm` (before clipping), `skipped`, `step_seconds`, `data_seconds` (waiting
    for data), `tokens_per_second`, `mfu`, `expert_max_over_mean` (worst layer), and on some steps `validation_loss` and
    `validation_exact_match` (share of the questions answered to the letter).
    """

    def __init__(self, path: Path, step: int):
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(path, "a")  # noqa: SIM115 - open for the whole run

    def write(self, record: dict[str, Any]) -> None:
        """Append a record and hand it to the operating system."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file; none where there is no file. A last line that was cut by a crash is left out."""
    records: list[dict[str, Any]] = []
    if path.exists():
        lines = path.read_text().splitlines()
        for i, line in enumerate(lines):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                if i != len(lines) - 1:
                    raise ValueError(f"{path}:{i + 1}: not a JSON record: {line[:80]!r}") from None
    return records
