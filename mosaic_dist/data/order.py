"""In which order the samples are seen: a pure function of (shard sizes, seed, position), the same for every rank."""

import numpy as np

BLOCK_SAMPLES = 1 << 18  # samples are spread over at least this range; the default of streaming's py1e
CHAPTER_SAMPLES = 1 << 22  # shuffled at once: bounds the memory (about 200 MB) and the wait at a start or an epoch


class Order:
    """Epoch 0's samples, then epoch 1's, and so on, without a gap; position p is sample p % n of epoch p // n.

    An epoch takes the shards in a random order of its own, cuts them into chapters of about CHAPTER_SAMPLES, and
    shuffles each chapter with `shuffle_shards`.
    """

    def __init__(self, shard_samples: np.ndarray, seed: int, shuffle: bool = True):
        self.shard_samples, self.seed, self.shuffle = shard_samples, seed, shuffle
        self.firsts = shard_samples.cumsum() - shard_samples
        self.samples = int(shard_samples.sum())
        # A shard that is larger than the block would not be mixed with others.
        self.block_samples = max(BLOCK_SAMPLES, 4 * int(shard_samples.max()))
        self._chapter = (0, 0, np.empty(0, np.int64))  # first position, end, and the sample numbers between

    def describe(self) -> dict[str, int | bool]:
        """The constants that the order depends on, for a fingerprint."""
        constants = {"order_version": 1, "block_samples": self.block_samples, "chapter_samples": CHAPTER_SAMPLES}
        return {"seed": self.seed, "shuffle": self.shuffle} | (constants if self.shuffle else {})

    def take(self, position: int, count: int) -> np.ndarray:
        """Sample numbers at `position` and the `count - 1` after it."""
        if not self.shuffle:
            return np.arange(position, position + count) % self.samples
        parts = []
        while count:
            begin, end, samples = self._chapter_at(position)
            found = samples[position - begin : min(end, position + count) - begin]
            parts.append(found)
            position, count = position + len(found), count - len(found)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _chapter_at(self, position: int) -> tuple[int, int, np.ndarray]:
        begin, end, _ = self._chapter
        if not begin <= position < end:
            epoch, inside = divmod(position, self.samples)
            shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.shard_samples))
            firsts = self.shard_samples[shards].cumsum() - self.shard_samples[shards]
            chapters = firsts // CHAPTER_SAMPLES
            mine = chapters == chapters[np.searchsorted(firsts, inside, side="right") - 1]
            begin = epoch * self.samples + int(firsts[mine][0])
            samples = self._shuffle(shards[mine], [self.seed, epoch, int(chapters[mine][0])])
            self._chapter = begin, begin + len(samples), samples
        return self._chapter

    def _shuffle(self, shards: np.ndarray, entropy: list[int]) -> np.ndarray:
        """Sample numbers of some shards, mixed."""
        sizes = self.shard_samples[shards]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        mixed = shuffle_shards(sizes, seed, self.block_samples)  # numbers within these shards laid end to end
        to_global = np.repeat(self.firsts[shards] - (sizes.cumsum() - sizes), sizes)
        return mixed + to_global[mixed]


def shuffle_shards(shard_samples: np.ndarray, seed: int, block_samples: int) -> np.ndarray:
    """All sample numbers of shards laid end to end, in an order that mixes neighbours within about `block_samples`.

    Takes the shards in random order and shuffles each; then every sample moves by a random distance, within a block
    around its shard. So few shards are in use at any time.

    This is the py1e of mosaicml-streaming for one node and its epoch 0, bit for bit: each draw, its order and its type
    are part of `order_version` 1, with which datasets were read.
    """
    generator = np.random.default_rng(seed)
    once = generator.permutation(len(shard_samples))
    shards = once[once]  # py1e shuffles them once for all epochs and once for this one, from equal seeds in epoch 0
    firsts = (shard_samples.cumsum() - shard_samples)[shards].tolist()
    sizes = shard_samples[shards].tolist()
    numbers = [first + generator.permutation(size) for first, size in zip(firsts, sizes, strict=True)]
    places, begin = np.arange(sum(sizes), dtype=np.float64), 0
    for size in sizes:
        end = begin + size
        block = generator.integers(int(0.75 * block_samples), int(1.25 * block_samples))
        reach = max(0.0, (block - size) / 2)
        places[begin:end] += generator.uniform(max(-reach, -begin), min(reach, len(places) - end), size)
        begin = end
    return np.concatenate(numbers)[places.argsort()]
