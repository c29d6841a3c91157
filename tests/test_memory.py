"""What a process asks of Python's garbage collector."""

import gc

import pytest

from mosaic_dist.memory import gc_frozen


@gc_frozen()
def frozen_then_failing(counts: list[int]) -> None:
    counts.append(gc.get_freeze_count())
    raise KeyError


def test_old_objects_are_left_alone_inside_only():
    gc.unfreeze()
    counts: list[int] = []
    with pytest.raises(KeyError):
        frozen_then_failing(counts)
    assert counts[0] > 1000
    assert gc.get_freeze_count() == 0
