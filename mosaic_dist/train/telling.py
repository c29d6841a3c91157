"""What a run says to people, beside its progress."""

import sys

from mosaic_dist.parallel import World


def say(world: World, text: str) -> None:
    """Tell people something, once."""
    if world.is_main:
        print(text, file=sys.stderr, flush=True)
