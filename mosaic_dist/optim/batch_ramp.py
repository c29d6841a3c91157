"""Batch-size ramp: the global batch is a pure function of the tokens before it, so that nothing of it needs saving."""

import itertools
import math
from collections.abc import Iterator, Sequence

from mosaic_dist.spec import Positive, Spec, SpecError


class BatchRamp(Spec):
    """A global batch that grows over the first tokens (GPT-3, arXiv 2005.14165, 2.3; DeepSeek-V3, 2412.19437, 4.2).

    The first one has `start_tokens`. From there to the full batch it grows by `increment_tokens` at a time (None: by
    `start_tokens`), at even distances over the first `over_tokens` tokens of the run. Ranks and micro-batches have no
    part in that: every cluster takes the same batches, or refuses them.
    """

    start_tokens: Positive
    over_tokens: Positive
    increment_tokens: Positive | None = None

    @property
    def increment(self) -> int:
        """By how many tokens the batch grows at a time."""
        return self.increment_tokens or self.start_tokens

    def batch_at(self, position: int, full: int) -> int:
        """Tokens of the batch that begins behind `position` tokens, where the full one has `full`."""
        increments = (full - self.start_tokens) // self.increment
        return self.start_tokens + self.increment * min(increments, increments * position // self.over_tokens)

    def batches(self, full: int) -> Iterator[int]:
        """Tokens of one batch after the other, as long as they are fewer than `full`."""
        position = 0
        while (batch := self.batch_at(position, full)) < full:
            yield batch
            position += batch

    def tokens_after(self, steps: int, full: int) -> int:
        """Tokens of so many batches, from the first one on."""
        smaller = list(itertools.islice(self.batches(full), steps))
        return sum(smaller) + (steps - len(smaller)) * full

    def sizes(self, position: int, full: int) -> range:
        """Tokens of every batch that there is behind `position` tokens, each size once."""
        return range(self.batch_at(position, full), full + 1, self.increment)

    def describe(self, full: int) -> str:
        """What it comes to, for people."""
        smaller = list(self.batches(full))
        return (
            f"the batch grows from {self.start_tokens:,} tokens by {self.increment:,} at a time, and is full behind "
            f"{len(smaller):,} steps, {sum(smaller):,} tokens"
        )

    def check_run(self, full: int, seq_len: int, steps: int) -> None:
        """SpecError unless the batches are of whole sequences, and the last of a run of so many steps is full."""
        self.check_sizes(full, seq_len, "the sequence length")
        last = self.batch_at(self.tokens_after(steps - 1, full), full)
        if last < full:
            raise SpecError(
                "over_tokens",
                f"{self.over_tokens} is too much for {steps} steps of {self.tokens_after(steps, full)} tokens: the "
                f"last batch has {last} of {full}; raise steps, or lower it",
            )

    def check_ahead(self, position: int, full: int, unit: int, why: str) -> None:
        """SpecError unless all batches behind `position` tokens are multiples of `unit`; see `check_sizes`."""
        if position == 0:
            self.check_sizes(full, unit, why)
        ahead = self.sizes(position, full)
        if any(size % unit for size in ahead):
            raise SpecError(
                "",
                f"the run is at a batch of {ahead[0]} tokens, and not all batches from there on are multiples of "
                f"{unit} tokens, {why}; that must divide {math.gcd(*ahead)}",
            )

    def check_sizes(self, full: int, unit: int, why: str) -> None:
        """SpecError unless the batches grow up to `full`, each a multiple of `unit`, which `why` explains.

        `unit` divides `full`.
        """
        start, gap = self.start_tokens, full - self.start_tokens
        if gap <= 0:
            raise SpecError("start_tokens", f"{start} is not less than batch_tokens ({full})")
        if _leads(start, self.increment, full, unit):
            return
        field, value = "start_tokens", start
        fitting = [size for size in range(unit, full, unit) if _leads(size, self.increment_tokens or size, full, unit)]
        if self.increment_tokens is not None and start % unit == 0:
            field, value = "increment_tokens", self.increment_tokens
            fitting = [size for size in range(unit, gap + 1, unit) if _leads(start, size, full, unit)]
        raise SpecError(
            field,
            f"{value} does not lead to batch_tokens ({full}) in equal increments over multiples of {unit} tokens, "
            f"{why}; {_nearest(value, fitting)}",
        )


def _leads(start: int, increment: int, full: int, unit: int) -> bool:
    """Whether a batch of `start` gets to `full` by equal increments, over multiples of `unit` only."""
    is_even = increment % unit == 0 or start + increment == full
    return (full - start) % increment == 0 and start % unit == 0 and is_even


def _nearest(value: int, fitting: Sequence[int]) -> str:
    """The ending of an error about a number of tokens, where those that are right ascend."""
    around = [*[size for size in fitting if size <= value][-1:], *[size for size in fitting if size > value][:1]]
    return f"nearest: {' or '.join(map(str, around))}" if around else "none would: change batch_tokens"
