"""The ramp against a table that was written by hand, and every size that does not fit refused with those that do."""

import itertools
from dataclasses import replace

import pytest

from mosaic_dist.optim import BatchRamp
from mosaic_dist.run_spec import Run
from mosaic_dist.spec import SpecError, override
from recipes.sweeps.small import run as small

SEQ_LEN, FULL = 16, 256
RAMP = BatchRamp(start_tokens=64, over_tokens=320)
TABLE = [  # sequences before a batch, and its own: a third of 320 tokens is 106.7, so the batch grows at 7, 14 and 20
    (0, 4),
    (4, 4),
    (8, 8),
    (16, 12),
    (28, 16),
    (44, 16),
    (60, 16),
]


def run_with(ramp: BatchRamp | None, **changes: int) -> Run:
    settings = {"data.seq_len": SEQ_LEN, "batch_tokens": FULL, "micro_batch_size": 1, "steps": 300} | changes
    return override(small, settings | {"batch_ramp": None if ramp is None else ramp.to_dict()})


def test_the_batches_are_those_of_the_table():
    run = run_with(RAMP)
    assert [run.sequences_at(cursor) for cursor, _ in TABLE] == [sequences for _, sequences in TABLE]
    assert list(RAMP.batches(FULL)) == [64, 64, 128, 192]
    for steps, (cursor, _) in enumerate(TABLE):
        assert run.tokens_after(steps) == cursor * SEQ_LEN
    assert run.tokens_after(304) - run.tokens_after(4) == 300 * FULL
    plain = run_with(None)
    assert plain.tokens_after(5) == 5 * FULL
    assert plain.sequences_at(0) == plain.sequences_at(10**9) == 16


def test_it_grows_where_its_share_of_the_tokens_lies_behind():
    """The first position with each size, by a search over all positions."""
    ramp = BatchRamp(start_tokens=32, over_tokens=700, increment_tokens=16)
    sizes = [ramp.batch_at(position, FULL) for position in range(1000)]
    firsts = {size: sizes.index(size) for size in sorted(set(sizes))}
    increments = (FULL - 32) // 16
    assert firsts == {32 + 16 * i: -(-700 * i // increments) for i in range(increments + 1)}
    assert sizes == sorted(sizes)
    assert list(ramp.sizes(0, FULL)) == sorted(set(sizes))
    assert list(ramp.sizes(10**6, FULL)) == [FULL]


@pytest.mark.parametrize(
    ("ramp", "path", "says"),
    [
        ({"start_tokens": 256}, "start_tokens", "256 is not less than batch_tokens (256)"),
        ({"start_tokens": 100}, "start_tokens", "multiples of 16 tokens, the sequence length; nearest: 64 or 128"),
        ({"start_tokens": 48}, "start_tokens", "nearest: 32 or 64"),
        ({"start_tokens": 8}, "start_tokens", "nearest: 16"),
        ({"start_tokens": 50, "increment_tokens": 48}, "start_tokens", "nearest: 16 or 64"),
        ({"start_tokens": 64, "increment_tokens": 80}, "increment_tokens", "nearest: 64 or 96"),
        ({"start_tokens": 64, "increment_tokens": 24}, "increment_tokens", "nearest: 16 or 32"),
        ({"start_tokens": 64, "over_tokens": 80_000}, "over_tokens", "the last batch has 64 of 256; raise steps"),
    ],
)
def test_a_ramp_that_cannot_be_is_refused_with_the_nearest_that_can(ramp, path, says):
    with pytest.raises(SpecError) as caught:
        override(
            run_with(None), {f"batch_ramp.{field}": value for field, value in ({"over_tokens": 320} | ramp).items()}
        )
    assert caught.value.path == f"batch_ramp.{path}"
    assert says in caught.value.reason


def fits(run: Run, ranks: int) -> bool:
    try:
        run.check_ramp(ranks)
    except SpecError:
        return False
    return True


def test_ranks_take_a_ramp_if_they_take_each_batch():
    """Against the batches themselves, for all small layouts and increments."""
    taken = 0
    for start, increment, ranks, micro_batch_size in itertools.product((2, 4, 6, 8), (2, 4), (1, 2, 4), (1, 2)):
        if (16 - start) % increment:
            continue
        ramp = BatchRamp(start_tokens=start * SEQ_LEN, over_tokens=900, increment_tokens=increment * SEQ_LEN)
        run = run_with(ramp, micro_batch_size=micro_batch_size)
        batches = {run.sequences_at(cursor) for cursor in range(100)}
        expected = all(batch % (ranks * micro_batch_size) == 0 for batch in batches)
        assert fits(run, ranks) == expected
        taken += expected
    assert 10 < taken < 40


def test_ranks_that_do_not_fit_are_told_what_would():
    run = run_with(RAMP, micro_batch_size=4)
    run.check_ramp(1)
    with pytest.raises(SpecError, match=r"batch_ramp.start_tokens: 64 .* 128 tokens, which 2 ranks .* of 4 .*: 128$"):
        run.check_ramp(2)
    finer = run_with(replace(RAMP, increment_tokens=48))
    with pytest.raises(SpecError, match=r"batch_ramp.increment_tokens: 48 .* 32 tokens, .*nearest: 32 or 64$"):
        finer.check_ramp(2)


def test_what_lies_behind_a_run_does_not_matter_to_its_ranks():
    run = run_with(RAMP)
    with pytest.raises(SpecError):
        run.check_ramp(8)
    with pytest.raises(
        SpecError, match=r"^batch_ramp: the run is at a batch of 192 tokens, .* of 128 tokens, .* must divide 64$"
    ):
        run.check_ramp(8, cursor=16)
    run.check_ramp(8, cursor=28)
    run.check_ramp(16, cursor=28)


def test_a_run_with_a_ramp_goes_to_yaml_and_back():
    run = run_with(RAMP)
    assert Run.from_yaml(run.to_yaml()) == run
    assert override(run, {"batch_ramp.over_tokens": 640}).batch_ramp == replace(RAMP, over_tokens=640)
