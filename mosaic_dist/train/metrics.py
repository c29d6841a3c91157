"""metrics.jsonl: one JSON object per logged step, in order of steps."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mosaic_dist.errors import UserError
from mosaic_dist.files import write_atomic


class MetricsFile:
    """Append-only record of a run. Opened for a run that continues at `step`, it drops what lies beyond.

    Fields of a record: `step` (updates done), `tokens` (seen so far), `loss` (mean cross-entropy in nats),
    `auxiliary_loss`, `learning_rate`, `grad_norm` (before clipping), `skipped`, `step_seconds`, `data_seconds` (of
    these, those that the main process waited for data) and their share `data_share`, `tokens_per_second`, `mfu`,
    `memory_bytes` (the most that the main process has needed so far: see `memory.py`), `epoch` (of the data, with its
    fraction), `expert_max_over_mean` (worst layer), `z_loss` (where the model has one), and on some steps
    `validation_loss` and `validation_exact_match` (share of the questions answered to the letter). Of a mixture there
    are `epoch/NAME` and `validation_loss/NAME` for each stream; `validation_loss` is their mean by proportion. The
    first record after a checkpoint is there has `save_seconds` (all that it took) and `save_stall_seconds` (for which
    training waited).

    A spike that was skipped has `spike_threshold`, above which its `loss` was. Where the run went back to a checkpoint,
    the record of the first step after that has `rewinds`, an object for each return to this checkpoint: `step`, `loss`
    and `threshold` of the spike, and `back_to_step`.

    Every `logging.experts_every_steps` there is also `experts`, with an object for each block that has experts, by its
    name in the model (`layers.1`). All but the last of its fields are of the step's global batch: `load` (choices per
    expert, dropped ones included), `max_over_mean` (load of the busiest expert over an even share), `dead` (share of
    the experts without a choice), `balance` and `z` (the losses before their weights), `entropy` (of the router's
    distribution, mean over tokens, in nats), `drop_rate` (share of the choices), and, where the router has one,
    `expert_bias` ([lowest, highest] over the experts, after the step).
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.last_step = 0
        """Of the last record."""
        self._open(step)

    def _open(self, step: int) -> None:
        kept, self.last_step = [], 0
        for record in each_record(self.path):
            if record["step"] <= step:
                kept.append(json.dumps(record) + "\n")
                self.last_step = record["step"]
        write_atomic(self.path, "".join(kept))
        self._file = open(self.path, "a")  # noqa: SIM115 - open for the whole run

    def go_back(self, step: int) -> None:
        """Drop the records of later steps: they are done anew."""
        self._file.close()
        self._open(step)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record and hand it to the operating system."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.last_step = record["step"]


def each_record(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a metrics file, one at a time: with many experts they are large together. None where there is no file.

    A last line that was cut by a crash is left out; UserError for any other that is no record.
    """
    if not path.exists():
        return
    broken: UserError | None = None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if broken is not None:
                raise broken
            no_record = UserError(f"{path}:{number}: not a JSON record: {line[:80]!r}; remove the line, or mend it")
            try:
                record = json.loads(line)
            except ValueError:  # neither JSON nor text
                broken = no_record
                continue
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise no_record
            yield record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All of `each_record`."""
    return list(each_record(path))
