"""The threshold of a spike, against numbers worked out by hand."""

import math

from mosaic_dist.optim import Spikes


def test_the_threshold_by_hand():
    """Median 4 and median deviation 1 of the last five, so 4 + 3 * 1.4826; the 100 before them is forgotten."""
    policy = Spikes(action="skip", deviations=3.0, window_steps=5)
    assert math.isclose(policy.threshold([100.0, 2.0, 3.0, 4.0, 5.0, 9.0]), 4.0 + 3.0 * 1.4826)


def test_nothing_is_judged():
    """Before the window is full, of losses that are all alike, and without a policy."""
    policy = Spikes(action="rewind", window_steps=4)
    assert policy.threshold([1.0, 2.0, 3.0]) == math.inf
    assert policy.threshold([2.0] * 4) == math.inf
    assert Spikes(window_steps=4).threshold([1.0, 2.0, 3.0, 4.0]) == math.inf


def test_what_is_remembered():
    assert Spikes(action="skip", window_steps=4).remember([1.0, 2.0, 3.0, 4.0], 5.0) == [2.0, 3.0, 4.0, 5.0]
    assert Spikes().remember([1.0], 2.0) == []
