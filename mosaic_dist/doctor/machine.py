"""Checks of what every rank has for itself: device, memory, programs, clock."""

import os
import platform
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

from mosaic_dist.doctor.check_result import CheckResult, judge
from mosaic_dist.doctor.rank_group import RankGroup, unlike
from mosaic_dist.train.folder import environment

GIB = 1 << 30
FREE_SHARE = 0.9
"""Of a GPU's memory before a run."""
HOST_BYTES, SHARED_BYTES = 2 * GIB, GIB
"""For each rank: what importing and reading data takes; and in /dev/shm, which NCCL and readers of data share."""
PRODUCT_SIZE = 1024
CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 1.0, 30.0
"""SLURM's and object stores' credentials are refused some minutes apart."""
CLOCK_ROUNDS = 5


def check_devices(party: RankGroup) -> CheckResult:
    """Whether all ranks have the same device, and it calculates. Every rank must call."""
    device = party.world.device
    ones = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, device=device)
    is_right = bool((ones @ ones == PRODUCT_SIZE).all())
    unseen = device.type == "cpu" and Path("/dev/nvidia0").exists()
    limit = f"the same on all {party.world.size} ranks"
    devices = party.gather(device_name(device))
    usual, others = unlike(devices)
    if wrong := [rank for rank, right in enumerate(party.gather(is_right)) if not right]:
        fix = "take these nodes out (sbatch --exclude) and have them tested"
        return CheckResult("devices", "fail", f"wrong products: {party.names(wrong)}", limit, fix)
    if others:
        value = f"{devices[others[0]]}: {party.names(others)}; else {usual}"
        return CheckResult("devices", "fail", value, limit, "ask for nodes of one kind (sbatch --constraint)")
    if blind := [rank for rank, is_blind in enumerate(party.gather(unseen)) if is_blind]:
        fix = "compare nvidia-smi with torch.version.cuda: the driver is too old, or torch is a CPU build"
        return CheckResult("devices", "fail", f"torch does not see the GPU: {party.names(blind)}", limit, fix)
    return CheckResult("devices", "ok", usual, limit)


def device_name(device: torch.device) -> str:
    """A GPU by its driver's name, a processor by its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}, {os.cpu_count()} cores"


def check_memory(party: RankGroup) -> CheckResult:
    """Whether the device's memory, or without a GPU the host's, is free for the run. Every rank must call."""
    if party.world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(party.world.device)
        needed = int(FREE_SHARE * total)
        fix = "another process holds it: see nvidia-smi there, and ask for whole nodes (sbatch --exclusive)"
    else:
        free, needed, fix = host_bytes(), HOST_BYTES * party.world.local_size, "use fewer ranks per node"
    return _least(party, "memory", free, needed, False, fix)


def check_shared_memory(party: RankGroup) -> CheckResult:
    """Whether /dev/shm has room for readers of data and NCCL. Every rank must call."""
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else SHARED_BYTES
    fix = "give the container more (--shm-size, --ipc=host)"
    return _least(party, "shared memory", free, SHARED_BYTES, True, fix)


def _least(party: RankGroup, check: str, free: int, needed: int, is_bearable: bool, fix: str) -> CheckResult:
    told = party.gather((free / needed, free, needed))
    rank, (share, found, limit) = min(enumerate(told), key=lambda pair: pair[1][0])
    value = f"least: {found / GIB:.1f} GiB free, {party.name(rank)}"
    return CheckResult(check, judge(share >= 1, is_bearable), value, f"at least {limit / GIB:.1f} GiB", fix)


def host_bytes() -> int:
    """Memory of this machine that processes can still have."""
    linux = Path("/proc/meminfo")
    for line in linux.read_text().splitlines() if linux.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_versions(party: RankGroup) -> CheckResult:
    """Whether all ranks run the same programs. Every rank must call."""
    told = party.gather(versions())
    limit = "the same on all ranks"
    for name in sorted({name for one in told for name in one}):
        values = [one.get(name, "none") for one in told]
        usual, others = unlike(values)
        if others:
            value = f"{name} {values[others[0]]}: {party.names(others)}; else {usual}"
            return CheckResult(
                "versions", "fail", value, limit, "start all nodes from one environment, or one container image"
            )
    return CheckResult("versions", "ok", f"torch {told[0]['torch']}, deepspeed {told[0]['deepspeed']}", limit)


def versions() -> dict[str, str]:
    """What this process runs on."""
    facts = environment()
    found = facts["packages"] | {"python": facts["python"], "commit": str(facts["git_commit"])}
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        driver = Path("/sys/module/nvidia/version")
        found["driver"] = driver.read_text().strip() if driver.exists() else "unknown"
    return found


def check_clock(party: RankGroup) -> CheckResult:
    """Whether the clocks of all ranks agree. Every rank must call."""
    apart = [float("inf")] * party.world.size
    for _ in range(CLOCK_ROUNDS):  # one leaves the barrier late now and then, but not every time
        dist.barrier()
        times = party.gather(time.time())
        middle = sorted(times)[len(times) // 2]
        apart = [min(seconds, abs(moment - middle)) for seconds, moment in zip(apart, times, strict=True)]
    rank = max(range(len(apart)), key=lambda i: apart[i])
    verdict = judge(apart[rank] < CLOCK_WARN_SECONDS, apart[rank] < CLOCK_FAIL_SECONDS)
    value = f"most: {apart[rank]:.3f} s apart, {party.name(rank)}"
    return CheckResult("clock", verdict, value, f"within {CLOCK_WARN_SECONDS:g} s", "start chrony or ntpd on the node")
