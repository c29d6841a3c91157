"""A recipe of which one rank fails in the middle of a step, while the others are in an exchange of the same layer.

The environment says which rank (FAULT_RANK), and how (FAULT): "raise", or "kill" for SIGKILL.
"""

import os
import signal
import time
from typing import Any

from mosaic_dist.model import Experts
from mosaic_dist.parallel import rank_from_environment
from mosaic_dist.run import main
from recipes.t4_moe import run

CALL = 20
"""The pass through experts that fails: in a step, and not in the first."""
FAULT_SAYS = "the fault is here at "


def arm(fault: str) -> None:
    """Let a pass through this process's experts fail."""
    forward, calls = Experts.forward, []

    def failing(experts: Experts, *words: Any) -> Any:
        calls.append(None)
        if len(calls) == CALL:
            print(f"{FAULT_SAYS}{time.time()}", flush=True)
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the experts of this rank are broken")
        return forward(experts, *words)

    Experts.forward = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    if rank_from_environment() == int(os.environ["FAULT_RANK"]):
        arm(os.environ["FAULT"])
    main(run)
