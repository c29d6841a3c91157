"""Softmax attention of whole sequences in memory linear in their length, whatever a token may see.

Documents become sequences of their own. A window cuts a sequence into blocks, each of which attends to itself and to
the block before under one mask for all. What is left is the lower triangle, for which fused kernels need no mask.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mosaic_dist.model.attention.attention import AttentionMetadata
from mosaic_dist.model.attention.kernel import Kernel, attend

MASKED_TOKENS = 512
"""Packed sequences up to this length take a mask: their documents are too small for batches of their own."""


def attend_visible(
    q_BNTH: Tensor,
    k_BGSH: Tensor,
    v_BGSU: Tensor,
    metadata: AttentionMetadata,
    *,
    index_S: Tensor | None = None,
    sliding_window: int | None = None,
    bias: Tensor | None = None,
    sinks_N: Tensor | None = None,
    logit_softcap: float | None = None,
    dropout: float = 0.0,
    kernel: Kernel = "sdpa",
) -> Tensor:
    """`attend` to the keys that `metadata` shows, the last `sliding_window` of them -> [B, N, T, U].

    `index_S` are the keys' indexes where some come from a cache. With those, with a bias, and written out by the
    "explicit" kernel, memory grows with T * S; else with T, and T * window.
    """
    T = q_BNTH.shape[2]
    sinks_N1 = None if sinks_N is None else sinks_N[:, None]
    if index_S is None and bias is None and kernel == "sdpa":
        if metadata.documents_BS is None:
            return _attend_window(q_BNTH, k_BGSH, v_BGSU, sliding_window, sinks_N1, dropout)
        if T > MASKED_TOKENS:
            return _attend_documents(q_BNTH, k_BGSH, v_BGSU, metadata, sliding_window, sinks_N1, dropout)
    is_triangle = index_S is None and metadata.documents_BS is None and (sliding_window is None or sliding_window >= T)
    visible = (
        None if is_triangle else metadata.visible(metadata.index_T if index_S is None else index_S, sliding_window)
    )
    return attend(
        q_BNTH,
        k_BGSH,
        v_BGSU,
        visible=visible,
        bias=bias,
        sinks_NT=sinks_N1,
        logit_softcap=logit_softcap,
        dropout=dropout,
        kernel=kernel,
    )


def _attend_documents(
    q_BNTH: Tensor,
    k_BGTH: Tensor,
    v_BGTU: Tensor,
    metadata: AttentionMetadata,
    sliding_window: int | None,
    sinks_N1: Tensor | None,
    dropout: float,
) -> Tensor:
    """Every document as a sequence of its own. Shapes change with every batch: compiled blocks leave this out."""
    B, _, T, _ = q_BNTH.shape
    cuts = metadata.cuts(B)
    of_tokens = [x.transpose(1, 2).flatten(0, 1) for x in (q_BNTH, k_BGTH, v_BGTU)]
    outs = []
    for tokens_RL in cuts.tokens_RL:
        q_RNLH, k_RGLH, v_RGLU = (
            x.index_select(0, tokens_RL.flatten()).unflatten(0, tokens_RL.shape).transpose(1, 2) for x in of_tokens
        )
        out_RNLU = _attend_window(q_RNLH, k_RGLH, v_RGLU, sliding_window, sinks_N1, dropout)
        outs.append(out_RNLU.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, cuts.places_S).unflatten(0, (B, T)).transpose(1, 2)


def _attend_window(
    q_BNTH: Tensor,
    k_BGTH: Tensor,
    v_BGTU: Tensor,
    sliding_window: int | None,
    sinks_N1: Tensor | None,
    dropout: float,
) -> Tensor:
    """Sequences without documents."""
    T = q_BNTH.shape[2]
    if sliding_window is not None and 2 * sliding_window < T:
        return _attend_blocks(q_BNTH, k_BGTH, v_BGTU, sliding_window, sinks_N1, dropout)
    visible = None if sliding_window is None or sliding_window >= T else _band(T, T, sliding_window, q_BNTH.device)
    return attend(q_BNTH, k_BGTH, v_BGTU, visible=visible, sinks_NT=sinks_N1, dropout=dropout)


def _attend_blocks(
    q_BNTH: Tensor, k_BGTH: Tensor, v_BGTU: Tensor, sliding_window: int, sinks_N1: Tensor | None, dropout: float
) -> Tensor:
    """Blocks of `sliding_window` queries, each with the keys of its own and of the block before, all but the first at
    once.

    The query heads of a key-value head are rows of one head: one mask then serves any kernel without repeated keys.
    """
    B, N, T, _ = q_BNTH.shape
    G = k_BGTH.shape[1]
    first = (x[:, :, :sliding_window] for x in (q_BNTH, k_BGTH, v_BGTU))
    first_BNWU = attend(*first, visible=None, sinks_NT=sinks_N1, dropout=dropout)
    q_CNWH = _blocks(q_BNTH, sliding_window)[:, 1:].flatten(0, 1)
    blocks = (_blocks(x, sliding_window) for x in (k_BGTH, v_BGTU))
    k_CGSH, v_CGSU = (torch.cat([x[:, :-1], x[:, 1:]], 3).flatten(0, 1) for x in blocks)
    out_CGRU = attend(
        q_CNWH.unflatten(1, (G, -1)).flatten(2, 3),
        k_CGSH,
        v_CGSU,
        visible=_band(sliding_window, 2 * sliding_window, sliding_window, q_BNTH.device).repeat(N // G, 1),
        sinks_NT=None if sinks_N1 is None else sinks_N1.expand(-1, sliding_window).reshape(G, -1),
        dropout=dropout,
    )
    out_CNWU = out_CGRU.unflatten(2, (-1, sliding_window)).flatten(1, 2)
    rest_BNTU = out_CNWU.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first_BNWU, rest_BNTU[:, :, : T - sliding_window]], 2)


def _blocks(x_BGTH: Tensor, rows: int) -> Tensor:
    """[B, blocks, G, rows, H]; the last block ends with zeros, which no token before them sees."""
    return functional.pad(x_BGTH, (0, 0, 0, -x_BGTH.shape[2] % rows)).unflatten(2, (-1, rows)).transpose(1, 2)


def _band(rows: int, keys: int, sliding_window: int, device: torch.device) -> Tensor:
    """Which of `keys` keys the last `rows` of them see as queries, bool [rows, keys]: the last `sliding_window` up to
    each.
    """
    at_T1 = torch.arange(keys - rows, keys, device=device)[:, None]
    index_S = torch.arange(keys, device=device)
    return (index_S <= at_T1) & (index_S > at_T1 - sliding_window)
