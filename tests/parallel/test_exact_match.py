"""The share of right answers against generation: rows whose answers are what one process generates greedily, or not."""

import json

import pytest
import torch
from torch import Tensor

from mosaic_dist.evaluate.generate import Sampling, generate
from mosaic_dist.targets import IGNORE_INDEX
from tests.launch import check, run_ranks
from tests.parallel.tiny import LENGTH, MODEL

ANSWERS = 4
"""Longest answer; the prompts are of different lengths."""


def rows() -> list[tuple[Tensor, Tensor]]:
    """Two batches of inputs and targets [6, LENGTH]; the second has 2 rows of the 4 that it has room for.

    The answers of rows 0, 1, 3 and 6 are right; 2 and 4 are wrong in their last token, 5 and 7 in their first.
    """
    model = MODEL.build_initialized(0).eval()
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, MODEL.vocab_size, (3 + i,), generator=generator).tolist() for i in range(8)]
    answers = zip(*generate(model, prompts, ANSWERS, Sampling(temperature=0.0)), strict=True)
    inputs, targets = torch.zeros(12, LENGTH, dtype=torch.int64), torch.full((12, LENGTH), IGNORE_INDEX)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        length = 1 + i % ANSWERS
        said = list(answer[:length])
        if i in (2, 4, 5, 7):
            wrong = length - 1 if i in (2, 4) else 0
            said[wrong] = (said[wrong] + 1) % MODEL.vocab_size
        text = [*prompt, *said]
        inputs[i, : len(text)] = torch.tensor(text)
        targets[i, len(prompt) - 1 : len(text) - 1] = torch.tensor(said)
    return list(zip(inputs.split(6), targets.split(6), strict=True))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    path = tmp_path_factory.mktemp("exact_match") / "told.json"
    check(run_ranks("tests.parallel.exact_match_ranks", 2, str(path)))
    return json.loads(path.read_text())


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_count_what_generation_gives(told, stage, degree):
    assert told[f"{stage}/{degree}"] == [4 / 8, 3 / 6]
