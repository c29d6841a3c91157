"""The command on tiny models: every part has its time, the times make up the step, and the largest part is found."""

import gzip
import json

import pytest
import torch

from mosaic_dist.errors import UserError
from mosaic_dist.profiling.command import profile
from tests.end_to_end.conftest import python
from tests.launch import ROOT

TINY = (
    "--steps 2 --warmup 1 --model.vocab 300 --model.context 64 --model.dim 64 --model.embedding.rank 16 "
    "--model.blocks.attention.heads 2 --batch_tokens 512 --micro_batch 4"
).split()
PARTS = {"attention", "norms and residuals", "head and loss", "embedding", "clipping and update"}


def profiled(output, *words: str) -> dict:
    """The figures of a profiled `t4_moe`, in a process of its own."""
    told = python("-m", "mosaic_dist", "profile", "recipes/t4_moe.py", "--json", "--output", output, *TINY, *words)
    return json.loads(told[told.index("{") : told.rindex("}") + 1])


@pytest.mark.parametrize("words", [[], ["--parallel.recompute.parts", "full"]], ids=["plain", "recomputed"])
def test_parts_make_up_the_step(tmp_path, words):
    found = profiled(tmp_path, *words)
    phases = found["phases"]
    assert phases.keys() >= PARTS | {"mixture of experts"}
    assert "feed-forward" not in phases
    total = sum(sum(of_phase.values()) for of_phase in phases.values())
    assert total == pytest.approx(found["step_seconds"], rel=0.02)  # on a CPU nothing runs beside
    for phase in ("attention", "mixture of experts", "head and loss", "norms and residuals"):
        assert min(phases[phase].values()) > 0, phase  # forward and backward
    assert phases["clipping and update"]["backward"] == 0
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "phase: attention" in names


def test_the_largest_part_is_found(tmp_path):
    """A network with a hundred times the arithmetic of all else, in both directions."""
    phases = profiled(tmp_path, "--model.blocks.ffn", "{type: swiglu, width: 20000}")["phases"]
    largest = phases.pop("feed-forward")
    for direction in ("forward", "backward"):
        assert largest[direction] > 2 * max(phases[part][direction] for part in PARTS - {"clipping and update"})


def test_words_that_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="give one recipe"):
        profile()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--memory_history is of a GPU's memory, and torch sees no GPU here"):
            profile("recipes/t4_moe.py", memory_history=True, output=str(tmp_path / "none"))
        assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be a folder: File exists"):
        profile("recipes/t4_moe.py", output=str(tmp_path / "file"))


@pytest.mark.gpu
def test_the_history_of_a_gpus_memory(tmp_path):
    profiled(tmp_path, "--memory_history")
    assert (tmp_path / "memory.pickle").stat().st_size > 10_000
