"""The shuffle, next to streaming's py1e."""

import warnings

import numpy as np
from streaming.base.shuffle import get_shuffle

from mosaic_dist.data.order import BLOCK_SAMPLES, shuffle_shards


def assert_equal_to_py1e(sizes: np.ndarray, seed: int, block: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Shuffle block size was smaller than shard size")
        expected = get_shuffle("py1e", sizes, num_canonical_nodes=1, seed=seed, epoch=0, block_size=block)
    made = shuffle_shards(sizes, seed, block)
    assert made.dtype == expected.dtype
    assert (made == expected).all(), (sizes, seed, block)


def test_the_order_is_that_of_py1e():
    """Blocks smaller than a shard, larger than everything, and between; shards of one sample; one shard."""
    chance = np.random.default_rng(0)
    for _ in range(200):
        sizes = chance.integers(1, chance.integers(2, 400), size=chance.integers(1, 60))
        assert_equal_to_py1e(sizes, int(chance.integers(2**32)), int(chance.integers(1, 3000)))
    for seed in (0, 2**32 - 1):
        assert_equal_to_py1e(np.array([1]), seed, 1)
        assert_equal_to_py1e(np.full(500, 777), seed, BLOCK_SAMPLES)
