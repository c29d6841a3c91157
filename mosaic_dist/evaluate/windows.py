"""Documents longer than the context, cut into overlapping windows that score each token once."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mosaic_dist.targets import IGNORE_INDEX

POOLED_BATCHES = 16
"""Windows of so many batches are sorted by length, so that those of a batch have about the same."""


class Window(NamedTuple):
    """Inputs and targets, int64 [T]; targets that an earlier window scored are IGNORE_INDEX."""

    inputs_T: np.ndarray
    targets_T: np.ndarray


def windows(tokens: np.ndarray, start: int, context: int, stride: int) -> Iterator[Window]:
    """Windows over a document [N] behind the token `start`, which is seen and not scored.

    Each begins `stride` tokens behind the one before, takes up to `context` inputs, and scores what no earlier one has.
    So each of the N tokens is scored once, and sees at least context - stride tokens of its document, or all before it:
    the evaluation that https://huggingface.co/docs/transformers/perplexity describes. With stride = context nothing
    overlaps; with 1 each token sees all that the context can hold.
    """
    sequence = np.concatenate([[start], tokens]).astype(np.int64)
    scored = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        targets_T = sequence[begin + 1 : end + 1].copy()
        targets_T[: scored - begin] = IGNORE_INDEX
        yield Window(sequence[begin:end], targets_T)
        scored = end
        if end == len(tokens):
            return


def batches(found: Iterable[Window], batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, int64 [B, T], padded at the right, where a causal model does not look."""
    left = iter(found)
    while pool := list(itertools.islice(left, POOLED_BATCHES * batch)):
        pool.sort(key=lambda window: len(window.inputs_T), reverse=True)
        for first in range(0, len(pool), batch):
            yield _stack(pool[first : first + batch])


def _stack(found: list[Window]) -> tuple[Tensor, Tensor]:
    longest = len(found[0].inputs_T)
    inputs_BT = np.zeros((len(found), longest), np.int64)
    targets_BT = np.full((len(found), longest), IGNORE_INDEX, np.int64)
    for i, window in enumerate(found):
        inputs_BT[i, : len(window.inputs_T)] = window.inputs_T
        targets_BT[i, : len(window.targets_T)] = window.targets_T
    return torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT)
