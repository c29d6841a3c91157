"""The arithmetic ceiling of a device, for model-FLOPs utilisation."""

import time

import torch
import torch.distributed as dist

from mosaic_dist.hardware import device_called
from mosaic_dist.model.matmul import linear

PROBE_SIZE = 1024
PROBE_SECONDS = 0.2


def peak_flops_per_second(device: torch.device) -> tuple[float, str]:
    """Operations per second that all ranks together could reach, and where the number comes from.

    A GPU that `hardware` knows counts with its datasheet's 16-bit rate; anything else is measured by float32 matrix
    products, on all ranks at the same time, since CPU ranks share cores and memory. Every rank must call.
    """
    if device.type == "cuda":
        known = device_called(torch.cuda.get_device_name(device))
        if known is not None:
            rate = known.rate(known.natural_precision)
            return rate * dist.get_world_size(), f"datasheet 16-bit rate of {known.name}"
    total = torch.tensor(_measure_matmul(device), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item(), "measured float32 matrix product"


def _measure_matmul(device: torch.device) -> float:
    left, right = (torch.full((PROBE_SIZE, PROBE_SIZE), 0.5, device=device) for _ in range(2))  # draws no randomness
    linear(left, right).sum().item()
    dist.barrier()
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < PROBE_SECONDS:
        linear(left, right)[0, 0].item()
        products += 1
    return 2 * PROBE_SIZE**3 * products / (time.perf_counter() - started)
