"""The run of `expert_run`, of which rank 1 never gets the data of the third step; test_watch starts it as ranks."""

import time
from collections.abc import Iterator
from dataclasses import replace

from mosaic_dist.data.batch import Batch
from mosaic_dist.data.stream import Loader
from mosaic_dist.parallel import Parallel, rank_from_environment
from mosaic_dist.run import main
from tests.train.expert_run import run
from tests.train.watch_ranks import SECONDS

LIMIT_SECONDS = 3.0
true_iterator = Loader.__iter__


def fetch(loader: Loader) -> Iterator[Batch]:
    """The batches, until one does not come."""
    for done, batch in enumerate(true_iterator(loader)):
        if done == 2 and rank_from_environment() == 1:
            time.sleep(SECONDS)
        yield batch


if __name__ == "__main__":
    Loader.__iter__ = fetch  # type: ignore[method-assign]
    limits = Parallel(timeout_seconds=SECONDS, step_timeout_seconds=LIMIT_SECONDS)
    main(replace(run, model=replace(run.model, vocab_size=300), parallel=limits))
