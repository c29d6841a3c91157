"""A run is killed while its batch grows, and goes on bitwise; its tokens are those that the dry run promised."""

import pytest

from mosaic_dist.checkpoint import newest
from tests.end_to_end.conftest import recipe, train
from tests.end_to_end.test_resume import kill_at_step, story

RAMP = "--steps 17 --batch_tokens 512 --batch_ramp.start_tokens 128 --batch_ramp.over_tokens 3072".split()
BATCHES = 8 * (4,) + 4 * (8,) + 3 * (12,) + 2 * (16,)
"""Sequences of 32 tokens: more from 32, 64 and 96 of them on, thirds of 3072 tokens."""


@pytest.fixture(scope="module")
def words(dataset):
    def words(folder, *more: str) -> list[str]:
        return [*recipe(folder, dataset), *RAMP, *more]

    return words


def test_killed_while_the_batch_grows(words, tmp_path):
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    done = train(*words(undisturbed))
    assert done.returncode == 0, done.stdout[-4000:]
    kill_at_step(words(folder), folder, 6)
    assert newest(folder / "checkpoints").step in (4, 8, 12)
    assert train(*words(folder)).returncode == 0
    assert story(folder) == story(undisturbed)
    assert [record["tokens"] for record in story(folder)] == [32 * sum(BATCHES[:i]) for i in range(1, 18)]
    ends = [newest(path / "checkpoints") for path in (folder, undisturbed)]
    assert ends[0].manifest["files"] == ends[1].manifest["files"]  # every byte of them, by checksum
    assert ends[0].state == ends[1].state
    assert ends[0].state["data"]["cursor"] == sum(BATCHES)


def test_the_dry_run_counts_tokens(words, tmp_path):
    done = train(*words(tmp_path / "run", "--dry_run"), ranks=1)
    assert (
        "ramp: the batch grows from 128 tokens by 128 at a time, and is full behind 15 steps, 3,200 tokens"
        in done.stdout
    )
    assert f"steps: 17 = {32 * sum(BATCHES):,} tokens" in done.stdout
