"""An export needs room for about two of the largest tensors, however many there are."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from mosaic_dist.convert.native import expected_shapes
from tests.convert.peak_export import spec
from tests.launch import ROOT, clean_environment

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")


def in_process(folder: Path, word: str) -> str:
    """What it prints; malloc gives back what is freed, so that its peak is that of the tensors that are there."""
    words = [sys.executable, "-m", "tests.convert.peak_export", str(folder), word]
    environment = clean_environment() | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(words, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_peak_memory_of_exports(tmp_path: Path) -> None:
    in_process(tmp_path, "write")
    sizes = [4 * math.prod(shape) for shape in expected_shapes(spec(1024, 2)).values()]
    assert sum(sizes) > 280e6
    assert max(sizes) > 30e6
    for name in ("fp32", "hf", "bf16"):
        peak_bytes = int(in_process(tmp_path, name))
        print(f"{name}: {peak_bytes:,} bytes, of the largest tensor {max(sizes):,}, of all {sum(sizes):,}")
        assert max(sizes) / 2 < peak_bytes < 2.2 * max(sizes), name
    for i, (name, shape) in enumerate(expected_shapes(spec(1024, 2)).items()):
        for file in (tmp_path / "fp32").glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                if name in opened.keys():  # noqa: SIM118 - not a dict
                    part = opened.get_slice(name)
                    assert tuple(part.get_shape()) == shape
                    assert bool((part[-1:] == float(i)).all())
