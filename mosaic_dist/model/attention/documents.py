"""The documents of packed sequences, laid out as batches of sequences of their own."""

from typing import NamedTuple

import torch
from torch import Tensor

SHORTEST = 64
"""Documents below this length are batched together: fewer, larger products."""


class Cuts(NamedTuple):
    """Where the documents of B sequences of T tokens, one after the other, go.

    A document lies at the beginning of a row as long as the next power of two, at most T; what follows it in the row is
    seen by none of its tokens in causal attention. So all rows together have less than twice the tokens, but for
    documents below `SHORTEST`, and equally long ones are one batch.
    """

    tokens_RL: tuple[Tensor, ...]
    """Of each batch of R rows of L tokens, which token is where."""
    places_S: Tensor
    """Where each of the B * T tokens is in all batches, flattened and joined."""


def cut_documents(documents_BT: Tensor) -> Cuts:
    """Cut packed sequences into documents (`Cuts`). On the meta device, which has no numbers, each sequence is one
    document.

    The lengths are read from the device once, which waits for it.
    """
    B, T = documents_BT.shape
    last = B * T - 1
    if documents_BT.is_meta:
        index_S = torch.arange(B * T, device="meta")
        return Cuts((index_S.view(B, T),), index_S)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts_R = begins_BT.flatten().cpu().nonzero().flatten()
    lengths_R = torch.diff(starts_R, append=torch.tensor([B * T]))
    rows_R = (2 ** lengths_R.double().log2().ceil().long()).clamp(SHORTEST).clamp(max=T)
    rows_R, order_R = rows_R.sort(stable=True)
    ends_R = rows_R.cumsum(0)
    shift_R = torch.empty_like(rows_R).scatter(0, order_R, ends_R - rows_R - starts_R[order_R])
    places_S = torch.arange(B * T) + shift_R.repeat_interleave(lengths_R)
    tokens = [
        (starts_R[order_R[rows_R == length], None] + torch.arange(int(length))).clamp(max=last)
        for length in rows_R.unique()
    ]
    device = documents_BT.device
    return Cuts(tuple(index_RL.to(device) for index_RL in tokens), places_S.to(device))
