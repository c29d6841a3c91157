"""Measures this machine for the planner."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mosaic_dist.errors import UserError
from mosaic_dist.files import check_output_file, write_atomic
from mosaic_dist.hardware import Device, device_called
from mosaic_dist.model.ffn.kernel import has_grouped_product
from mosaic_dist.model.matmul import linear

PRODUCT_SIZE, GPU_PRODUCT_SIZE = 1024, 8192
COPY_ELEMENTS, GPU_COPY_ELEMENTS = 2**24, 2**28
"""Float32; more than caches hold."""
LEAST_SECONDS = 0.5


def calibrate(path: Path) -> Device:
    """Measure matrix products and copies here, and write a file for `--gpu`. UserError if there is one already.

    Links need more than one process: they are taken from the known device of this name, or else from the speed of
    copies, which is what ranks of one CPU share.
    """
    if path.exists():
        raise UserError(f"{path} exists; give --calibrate a new file")
    check_output_file(path)
    on_gpu = torch.cuda.is_available()
    where = torch.device("cuda" if on_gpu else "cpu")
    name = torch.cuda.get_device_name() if on_gpu else f"CPU with {torch.get_num_threads()} threads"
    known = device_called(name) if on_gpu else None
    links = "of the data sheet" if known else "not measured: the speed of copies"
    size = GPU_PRODUCT_SIZE if on_gpu else PRODUCT_SIZE
    has_bf16 = on_gpu and torch.cuda.get_device_capability() >= (8, 0)
    dtypes = [torch.float32] + on_gpu * [torch.float16] + has_bf16 * [torch.bfloat16]
    rates = {dtype: 2 * size**3 / _seconds(_product(size, dtype, where), where) for dtype in dtypes}
    copied = torch.randn(GPU_COPY_ELEMENTS if on_gpu else COPY_ELEMENTS, device=where)
    bandwidth = 2 * copied.nbytes / _seconds(copied.clone, where)
    device = Device(
        name=name,
        kind="cuda" if on_gpu else "cpu",
        fp32=rates[torch.float32],
        fp16=rates.get(torch.float16, 0.0),
        bf16=rates.get(torch.bfloat16, 0.0 if on_gpu else rates[torch.float32]),
        reachable=1.0,
        grouped=has_grouped_product(where),
        memory_bytes=torch.cuda.get_device_properties(where).total_memory if on_gpu else _host_bytes(),
        memory_bytes_per_second=bandwidth,
        node_bytes_per_second=known.node_bytes_per_second if known else bandwidth,
        network_bytes_per_second=known.network_bytes_per_second if known else bandwidth,
        source=f"measured by --calibrate; links {links}",
    )
    write_atomic(path, device.to_yaml())
    return device


def _product(size: int, dtype: torch.dtype, where: torch.device) -> Callable[[], torch.Tensor]:
    """Of random numbers: on constants a GPU's clock stays higher (13 % on an H200)."""
    left, right = (torch.randn(size, size, dtype=dtype, device=where) for _ in range(2))
    return lambda: linear(left, right)


def _seconds(action: Callable[[], torch.Tensor], where: torch.device) -> float:
    """Of one call, on average."""

    def finish() -> None:
        if where.type == "cuda":
            torch.cuda.synchronize(where)

    action()
    finish()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < LEAST_SECONDS:
        action()
        finish()
        calls += 1
    return (time.perf_counter() - started) / calls


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
