"""Rows that are a question and its answer each, and which of their targets are scored."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerLoss:
    """Each row is BOS, prompt, answer, EOS, then padding. Scored are the answer and its EOS.

    The prompt ends with the first `mark_id` of the row. `row_tokens` are those of the longest row, padding left out: a
    reader may cut the rows anywhere behind them. A `pad_id` that is also the EOS would leave the end unscored.
    """

    mark_id: int
    pad_id: int
    row_tokens: int

    def unscored(self, tokens_BT: np.ndarray) -> np.ndarray:
        """bool [B, T] for tokens [B, T + 1]: True where target t, token t + 1, is of the prompt or padding."""
        in_answer_BT = np.logical_or.accumulate(tokens_BT[:, :-1] == self.mark_id, axis=1)
        return ~in_answer_BT | (tokens_BT[:, 1:] == self.pad_id)
