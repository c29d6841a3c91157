"""How fast ranks exchange rows, as experts do, each one compared with its peers."""

import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from mosaic_dist.doctor.check_result import CheckResult
from mosaic_dist.doctor.rank_group import RankGroup
from mosaic_dist.parallel import World

GPU_BYTES, CPU_BYTES = 64 << 20, 4 << 20
REPEATS = 3


def check_exchange(party: RankGroup, factor: float, between_nodes: bool) -> CheckResult:
    """Whether every rank exchanges with others of its node, or of other nodes, at `factor` of the median at least.

    Ranks are paired by each power of two, and of a rank its best pair counts: one that is slow with all partners is
    slow itself. Every rank must call.
    """
    check = "exchange between nodes" if between_nodes else "exchange in a node"
    limit = f"at least {factor:g} of the median"
    told = party.gather(best_rate(party.world, between_nodes))
    rates = {rank: rate for rank, rate in enumerate(told) if rate is not None}
    if not rates:
        return CheckResult(check, "ok", "nothing to measure", limit)
    middle = statistics.median(rates.values())
    if slow := slow_ranks(told, factor):
        value = f"{rates[slow[0]]:.2f} GB/s: {party.names(slow)}; median {middle:.2f} GB/s"
        fix = (
            "take these nodes out (sbatch --exclude); look at their links (ibstat, nvidia-smi topo -m, NCCL_DEBUG=INFO)"
        )
        return CheckResult(check, "fail", value, limit, fix)
    return CheckResult(check, "ok", f"slowest {min(rates.values()):.2f} GB/s, median {middle:.2f} GB/s", limit)


def slow_ranks(rates: Sequence[float | None], factor: float) -> list[int]:
    """The ranks below `factor` of the median; None is a rank that was not measured."""
    middle = statistics.median(rate for rate in rates if rate is not None)
    return [rank for rank, rate in enumerate(rates) if rate is not None and rate < factor * middle]


def best_rate(world: World, between_nodes: bool) -> float | None:
    """GB/s that this rank sends in its best pair, while it receives as much; None where it has no such partner."""
    best, distance = 0.0, 1
    while distance < world.size:
        partner = world.rank ^ distance
        fits = partner < world.size and (partner // world.local_size != world.rank // world.local_size) == between_nodes
        best = max(best, _rate(world, partner if fits else None))
        distance *= 2
    return best or None


def _rate(world: World, partner: int | None) -> float:
    """GB/s with a partner, 0.0 without. Every rank must call, for all exchanges are one collective."""
    sizes = [0] * world.size
    if partner is not None:
        sizes[partner] = (GPU_BYTES if world.device.type == "cuda" else CPU_BYTES) // 4
    sent_R = torch.ones(sum(sizes), device=world.device)
    received_R = torch.empty_like(sent_R)
    seconds = []
    for _ in range(1 + REPEATS):  # the first one connects
        dist.barrier()
        started = time.perf_counter()
        dist.all_to_all_single(received_R, sent_R, sizes, sizes)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 0.0 if partner is None else 4 * sent_R.numel() / 1e9 / min(seconds[1:])
