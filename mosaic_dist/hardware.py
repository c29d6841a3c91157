"""Devices and their links: every number about hardware, and where it comes from.

Rates are dense (without structured sparsity) and decimal, as data sheets give them. A link's rate is that of one
direction; NVIDIA states NVLink for both together. `reachable` is measured: see `MATRIX_PRODUCTS`.
"""

import re
from pathlib import Path
from typing import Literal

from mosaic_dist.errors import UserError
from mosaic_dist.spec import NonNegativeFloat, PositiveFloat, Spec, UnitInterval

MATRIX_PRODUCTS = (
    "best bfloat16 matrix products of the Maximum Achievable Matmul FLOPS table in S. Bekman's Machine Learning "
    "Engineering (stas00/ml-engineering, compute/accelerator), in TFLOP/s: A100 271.2, H100 and H200 794.5, B200 1745"
)
INFINIBAND = "a ConnectX adapter per GPU as in NVIDIA's DGX: 200 Gb/s (A100) or 400 Gb/s (H100, H200, B200)"


class Device(Spec):
    """A processor, and how it reaches others.

    `fp32`, `fp16`, `bf16` are operations per second of matrix products; 0: not supported. `reachable` is the share of
    them that large products get. `grouped`: torch has a fast product of all experts at once in bfloat16 for it.
    """

    name: str
    kind: Literal["cuda", "cpu"] = "cuda"
    fp32: PositiveFloat
    fp16: NonNegativeFloat = 0.0
    bf16: NonNegativeFloat = 0.0
    reachable: UnitInterval
    grouped: bool = False
    memory_bytes: PositiveFloat
    memory_bytes_per_second: PositiveFloat
    node_bytes_per_second: PositiveFloat
    """To the other devices of its node."""
    network_bytes_per_second: PositiveFloat
    """To other nodes."""
    source: str

    def rate(self, precision: str) -> float:
        """Operations per second of matrix products in "fp32", "fp16" or "bf16". UserError where there are none."""
        found = {"fp32": self.fp32, "fp16": self.fp16, "bf16": self.bf16}[precision]
        if not found:
            raise UserError(f"{self.name} has no {precision}; use --precision {self.natural_precision}")
        return found

    @property
    def natural_precision(self) -> str:
        """What a run's precision "auto" means on it."""
        return "fp32" if self.kind == "cpu" else "bf16" if self.bf16 else "fp16"


DEVICES = {
    "t4": Device(
        name="T4",
        fp32=8.1e12,
        fp16=65e12,
        reachable=0.776,
        memory_bytes=16e9,
        memory_bytes_per_second=300e9,
        node_bytes_per_second=16e9,
        network_bytes_per_second=100e9 / 8 / 8,
        source="NVIDIA T4 data sheet: PCIe 3.0 x16 in a node; 100 Gb/s for a node of 8, as in AWS g4dn.metal. "
        "Reachable: not measured, the lowest of the others",
    ),
    "a100": Device(
        name="A100",
        fp32=19.5e12,
        fp16=312e12,
        bf16=312e12,
        reachable=271.2 / 312,
        memory_bytes=80e9,
        memory_bytes_per_second=2039e9,
        node_bytes_per_second=300e9,
        network_bytes_per_second=25e9,
        source="NVIDIA A100 data sheet, SXM 80 GB: NVLink 600 GB/s both ways",
    ),
    "h100_pcie": Device(
        name="H100 PCIe",
        fp32=51e12,
        fp16=756e12,
        bf16=756e12,
        reachable=794.5 / 989,
        grouped=True,
        memory_bytes=80e9,
        memory_bytes_per_second=2000e9,
        node_bytes_per_second=64e9,
        network_bytes_per_second=50e9,
        source="NVIDIA H100 data sheet, PCIe: Gen5 128 GB/s both ways, without bridges. Reachable: as H100 SXM",
    ),
    "h100": Device(
        name="H100",
        fp32=67e12,
        fp16=989e12,
        bf16=989e12,
        reachable=794.5 / 989,
        grouped=True,
        memory_bytes=80e9,
        memory_bytes_per_second=3350e9,
        node_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
        source="NVIDIA H100 data sheet, SXM: NVLink 900 GB/s both ways",
    ),
    "h200": Device(
        name="H200",
        fp32=67e12,
        fp16=989e12,
        bf16=989e12,
        reachable=794.5 / 989,
        grouped=True,
        memory_bytes=141e9,
        memory_bytes_per_second=4800e9,
        node_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
        source="NVIDIA H200 data sheet, SXM: NVLink 900 GB/s both ways",
    ),
    "b200": Device(
        name="B200",
        fp32=75e12,
        fp16=2250e12,
        bf16=2250e12,
        reachable=1745 / 2250,
        grouped=True,
        memory_bytes=180e9,
        memory_bytes_per_second=7700e9,
        node_bytes_per_second=900e9,
        network_bytes_per_second=50e9,
        source="NVIDIA HGX B200 data sheet, an eighth of the board: NVLink 1.8 TB/s both ways",
    ),
}
"""By the word of `--gpu`. Of names that contain another, the longer one comes first."""


def device_called(name: str) -> Device | None:
    """The device whose name a driver's name contains as a word (as "NVIDIA H100 80GB HBM3"); None for others."""
    return next((device for device in DEVICES.values() if re.search(rf"\b{device.name}\b", name)), None)


def find_device(word: str) -> Device:
    """A device by its word, or from a YAML file that describes one. UserError where it is neither."""
    if word.lower() in DEVICES:
        return DEVICES[word.lower()]
    path = Path(word)
    if not path.is_file():
        known = ", ".join(DEVICES)
        raise UserError(f"--gpu {word}: not a known device ({known}), and no such file (--calibrate writes one)")
    try:
        return Device.from_yaml(path.read_text())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
