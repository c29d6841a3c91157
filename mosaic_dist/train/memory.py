"""How much memory a process has needed."""

import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int:
    """The most that this process has had at once: its tensors on the GPU, or without a GPU all that was resident.

    Linux tells the latter as VmHWM. What getrusage tells there counts the process that started this one, too.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    for line in STATUS.read_text().splitlines() if STATUS.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10
