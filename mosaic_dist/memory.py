"""What this process asks of glibc's malloc, and of Python's garbage collector."""

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed instead of giving them back to the system each time.

    For processes that free and take tensors of the same sizes all the time: every page that comes back from the system
    costs a fault, which is 8 % of a layer with 64 experts on a CPU, and a third of the time of an export. Settings in
    the environment (MALLOC_..._) go before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
            mallopt(option, value)


@contextlib.contextmanager
def gc_frozen() -> Iterator[None]:
    """Let Python's collector look at objects only that are made inside of a `with` block.

    A full collection walks through all that imports and the building of a model have left: with torch and DeepSpeed
    about 200 ms, every few steps, and on another rank each time, for which all others wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
