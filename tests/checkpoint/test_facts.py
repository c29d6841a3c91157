"""What is told of a checkpoint is what is in it."""

import json
import math
from pathlib import Path

from mosaic_dist.checkpoint import Checkpoint, save
from mosaic_dist.checkpoint.facts import checkpoint_facts, list_checkpoints
from tests.checkpoint.samples import DTYPES, SHAPES, save_small


def test_sizes_by_kind_and_the_largest(folder: Path) -> None:
    path = folder / "good" / "step_00000100"
    facts = checkpoint_facts(Checkpoint.open(path))
    elements = {name: math.prod(shape) for name, shape in SHAPES.items()}
    for kind, dtype in DTYPES.items():
        row = facts["kinds"][kind]
        assert (row["tensors"], row["elements"]) == (len(SHAPES), sum(elements.values()))
        assert row["bytes"] == sum(elements.values()) * dtype.itemsize
    assert (facts["step"], facts["files"], facts["parameters"]) == (100, 2, sum(elements.values()))
    assert facts["bytes"] == sum(file.stat().st_size for file in path.glob("*.safetensors"))
    largest = [row["name"] for row in facts["largest_tensors"]]
    assert largest == sorted(elements, key=lambda name: -elements[name])
    assert json.loads(json.dumps(facts)) == facts


def test_the_layout_is_what_the_engine_told_and_unknown_where_none_did(tmp_path: Path) -> None:
    told = {"ranks": 2, "expert_parallel": 2, "sequence_parallel": 2, "zero_stage": 3}
    told |= {"precision": "bf16", "accumulation": 4, "micro_batch_size": 8}
    ours = Checkpoint.open(save(tmp_path, 1, [], {}, {"layout": told}, {}))
    assert checkpoint_facts(ours)["layout"] == told
    older = Checkpoint.open(save(tmp_path, 2, [], {}, {}, {}))
    assert checkpoint_facts(older)["layout"] == dict.fromkeys(told, "unknown") | {"ranks": 1}


def test_broken_ones_are_listed_with_the_reason(tmp_path: Path) -> None:
    for step in (1, 2):
        save_small(tmp_path, step)
    (tmp_path / "step_00000002" / "rank_00000.safetensors").unlink()
    first, second = list_checkpoints(tmp_path)
    assert (first["step"], first["problem"]) == (1, None)
    assert first["bytes"] == (tmp_path / "step_00000001" / "rank_00000.safetensors").stat().st_size
    assert "rank_00000.safetensors cannot be read" in second["problem"]
