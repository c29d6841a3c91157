"""Worlds of several sizes from one start of Python, whose imports take longer than a tiny model's training.

`python -m tests.parallel.forked MODULE SIZES WORDS...` calls `MODULE.main(*WORDS)` as the ranks of a world of each size
(as 1,2,4), one world after the other. Exit code 1 with the first rank that fails; the others are then killed.
"""

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable

from mosaic_dist.parallel.world import free_port

LOADED_LATER = ("mosaic_dist.parallel", "torch._dynamo", "torch._inductor.standalone_compile")
"""What DeepSpeed would import in every rank."""

LIMIT_SECONDS = 300


def fork_rank(main: Callable[..., None], words: list[str], rank: int, size: int, port: int) -> int:
    """Start one rank; its process id."""
    pid = os.fork()
    if pid:
        return pid
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    signal.alarm(LIMIT_SECONDS)  # nobody would end the ranks of a test that was killed
    code = 1
    try:
        main(*words)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_world(main: Callable[..., None], words: list[str], size: int) -> bool:
    """Whether all ranks of a world ended well."""
    port = free_port()
    alive = {fork_rank(main, words, rank, size, port) for rank in range(size)}
    while alive:
        pid, status = os.wait()
        alive.discard(pid)
        if status:
            for other in alive:
                os.kill(other, signal.SIGKILL)
            return False
    return True


def run(module: str, sizes: str, *words: str) -> None:
    """Run the `main` of a module with `words` in forked ranks, once for each of the sizes."""
    for name in LOADED_LATER:
        importlib.import_module(name)
    main = importlib.import_module(module).main
    for size in sizes.split(","):
        if not run_world(main, list(words), int(size)):
            sys.exit(1)


if __name__ == "__main__":
    run(*sys.argv[1:])
