"""Who a process is among those of its run, and which device it takes, before any process group exists."""

import pytest
import torch

from mosaic_dist.errors import UserError
from mosaic_dist.parallel import local_size_from_environment
from mosaic_dist.parallel import world as worlds

LAUNCHERS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE")


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes torch see so many GPUs."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


@pytest.mark.parametrize(
    ("seen", "local_rank", "device"),
    [(8, 5, "cuda:5"), (1, 0, "cuda:0"), (1, 5, "cuda:0"), (0, 5, "cpu")],
    ids=["a node's", "one process", "gpus-per-task=1", "none"],
)
def test_the_device_of_a_process(gpus, seen, local_rank, device):
    gpus(seen)
    assert worlds.choose_device(local_rank, 8) == torch.device(device)


def test_fewer_gpus_than_processes_are_refused_on_all_of_them(gpus):
    gpus(4)
    for local_rank in range(8):
        with pytest.raises(UserError, match=r"8 processes on this node, but torch sees 4 GPUs; .* --gpus-per-task=1"):
            worlds.choose_device(local_rank, 8)


def test_deepspeed_is_told_the_device_and_the_world_the_rank(gpus, monkeypatch):
    """DeepSpeed takes the device whose number LOCAL_RANK is."""
    gpus(1)
    taken, joined = [], []
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *words, **named: joined.append(named))
    world = worlds.join_world(1.0)
    assert (world.rank, world.local_rank, world.device) == (5, 5, torch.device("cuda", 0))
    assert taken == [joined[0]["device_id"]] == [torch.device("cuda", 0)]
    assert worlds.os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("name", "value", "size"), [("LOCAL_SIZE", "2", 2), ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3", 4), ("OTHER", "2", 16)]
)
def test_the_processes_of_a_node(monkeypatch, name, value, size):
    for launcher in LAUNCHERS:
        monkeypatch.delenv(launcher, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv(name, value)
    assert local_size_from_environment() == size
