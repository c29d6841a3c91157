"""The command on tiny models: every part has its time, the times make up the step, and the largest part is found."""

import gzip
import json

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from mosaic_dist.errors import UserError
from mosaic_dist.profiling.command import profile
from mosaic_dist.profiling.phases import PREFIX, STEP, spent, step_seconds
from tests.end_to_end.conftest import python
from tests.launch import ROOT

TINY = (
    "--steps 2 --warmup 1 --model.vocab_size 300 --model.max_seq_len 64 --model.dim 64 --model.embedding.rank 16 "
    "--model.layers.attention.heads 2 --batch_tokens 512 --micro_batch_size 4"
).split()
PARTS = {"attention", "norms and residuals", "head and loss", "embedding", "clipping and update"}


def profiled(output, *words: str) -> dict:
    """The figures of a profiled `t4_moe`, in a process of its own."""
    told = python("-m", "mosaic_dist", "profile", "recipes/t4_moe.py", "--json", "--output", output, *TINY, *words)
    return json.loads(told[told.index("{") : told.rindex("}") + 1])


@pytest.mark.parametrize(
    "words", [[], ["--parallel.activation_checkpointing.parts", "full"]], ids=["plain", "recomputed"]
)
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
    phases = profiled(tmp_path, "--model.layers.ffn", "{type: swiglu, hidden_dim: 20000}")["phases"]
    largest = phases.pop("feed-forward")
    for direction in ("forward", "backward"):
        assert largest[direction] > 2 * max(phases[part][direction] for part in PARTS - {"clipping and update"})


def event(name: str, place: DeviceType, start: float, end: float, parent: FunctionEvent | None = None) -> FunctionEvent:
    """One of a profiler's, on the CPU or of the device's own line of time."""
    made = FunctionEvent(1, name, 0, start, end, device_type=place, use_device="cuda", sequence_nr=-1)
    if parent is not None:
        made.set_cpu_parent(parent)
        parent.append_cpu_child(made)
    return made


def test_a_kernel_of_a_gpu_counts_once():
    """torch's profiler puts copies of the ranges on the device's line of time, and the kernels there once more."""
    step = event(STEP, DeviceType.CPU, 0, 100)
    attention = event(PREFIX + "attention", DeviceType.CPU, 10, 50, step)
    product = event("aten::mm", DeviceType.CPU, 20, 40, attention)
    product.append_kernel("gemm", 0, 70.0)
    copy = event(PREFIX + "attention", DeviceType.CUDA, 30, 100)
    gemm = event("gemm", DeviceType.CUDA, 30, 100)
    found = spent([step, attention, product, copy, gemm], on_device=True)
    assert {phase: seconds.total for phase, seconds in found.items()} == {"attention": pytest.approx(70e-6)}


def phase_seconds(device: str) -> tuple[float, float]:
    """The phases' time of a few products, and the time of the kernels or operations themselves."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    x = torch.randn(256, 256, device=device)
    with torch_profile(activities=activities) as profiler, record_function(STEP):
        with record_function(PREFIX + "attention"):
            for _ in range(50):
                x = (x @ x).clamp(-1, 1)
        if device == "cuda":
            torch.cuda.synchronize()
    events = profiler.events()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    whole = sum(e.time_range.elapsed_us() for e in kernels) if device == "cuda" else step_seconds(events) * 1e6
    return sum(seconds.total for seconds in spent(events, device == "cuda").values()), whole / 1e6


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_phases_sum_to_the_step(device):
    phases, whole = phase_seconds(device)
    assert phases == pytest.approx(whole, rel=0.02)


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
def test_parts_fit_into_the_step_of_a_gpu(tmp_path):
    """What is left of a step the device waits; nothing counts twice."""
    found = profiled(tmp_path)
    total = sum(sum(of_phase.values()) for of_phase in found["phases"].values())
    assert 0 < total <= found["step_seconds"]


@pytest.mark.gpu
def test_the_history_of_a_gpus_memory(tmp_path):
    profiled(tmp_path, "--memory_history")
    assert (tmp_path / "memory.pickle").stat().st_size > 10_000
