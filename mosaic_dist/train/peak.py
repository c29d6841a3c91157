"""The arithmetic ceiling of a device, for model-FLOPs utilisation."""

import time

import torch
import torch.distributed as dist

DATASHEET_BF16 = {
    "T4": 65e12,  # fp16; the card has no bf16
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Dense 16-bit matrix rates of NVIDIA's datasheets, in operations per second; the first name contained wins."""

PROBE_SIZE = 1024
PROBE_SECONDS = 0.2


def peak_flops_per_second(device: torch.device) -> tuple[float, str]:
    """Operations per second that all ranks together could reach, and where the number comes from.

    A GPU of the table counts with its datasheet's 16-bit rate; anything else is measured by float32 matrix products,
    on all ranks at the same time, since CPU ranks share cores and memory. Every rank must call.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, rate in DATASHEET_BF16.items():
            if key in name:
                return rate * dist.get_world_size(), f"datasheet 16-bit rate of {key}"
    total = torch.tensor(_measure_matmul(device), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item(), "measured float32 matrix product"


def _measure_matmul(device: torch.device) -> float:
    left, right = (torch.full((PROBE_SIZE, PROBE_SIZE), 0.5, device=device) for _ in range(2))  # draws no randomness
    (left @ right).sum().item()
    dist.barrier()
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < PROBE_SECONDS:
        (left @ right)[0, 0].item()
        products += 1
    return 2 * PROBE_SIZE**3 * products / (time.perf_counter() - started)
