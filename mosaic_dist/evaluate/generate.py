"""Text from a model, token by token, with a cache."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mosaic_dist.errors import UserError
from mosaic_dist.model import TransformerModel
from mosaic_dist.model.transformer import Cache

PADDING, TEXT = -1, 0  # documents: padding before a short prompt is one of its own, which no token of the text sees


class Sampling(NamedTuple):
    """How the next token is drawn from the logits; the steps are taken in this order.

    `repetition_penalty` divides positive logits of tokens that were there, and multiplies negative ones (CTRL, arXiv
    1909.05858). `temperature` 0 takes the most likely token. `top_k` keeps the k most likely tokens, `top_p` the fewest
    whose probabilities reach p (Holtzman et al., arXiv 1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0


@torch.no_grad()
def generate(
    model: TransformerModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - immutable
    stop_tokens: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """Continue prompts of any lengths at once; yields the next token of each, None for one that has ended.

    A prompt ends with any of `stop_tokens`, which is not yielded. Once a sequence fills the model's context, the model
    goes on with the last half of it. What a prompt gets does not depend on the others (up to rounding, and the draws).
    """
    if not prompts or not all(prompts):
        raise UserError("a prompt has no tokens; give at least one character")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    texts = [list(prompt) for prompt in prompts]
    running = [True] * len(texts)
    cache: Cache | None = None
    for _ in range(max_new_tokens):
        if cache is None or cache.length == model.spec.max_seq_len:
            longest = model.spec.max_seq_len if cache is None else max(1, model.spec.max_seq_len // 2)
            cache = model.new_cache(len(texts))
            tokens_BT, documents_BT = pad_left([text[-longest:] for text in texts], device)
        else:
            tokens_BT = torch.tensor([[text[-1]] for text in texts], device=device)
            documents_BT = torch.full_like(tokens_BT, TEXT)
        logits_BV = model(tokens_BT, documents_BT=documents_BT, cache=cache)[:, -1].float().cpu()
        step: list[int | None] = []
        for i, text in enumerate(texts):
            token = draw(logits_BV[i], text, sampling, generator)
            running[i] = running[i] and token not in stop_tokens
            text.append(token)
            step.append(token if running[i] else None)
        if not any(running):
            return
        yield step


def pad_left(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and documents, int64 [B, T], of texts that end together."""
    longest = max(map(len, texts))
    gaps = [longest - len(text) for text in texts]
    tokens = [[0] * gap + list(text) for gap, text in zip(gaps, texts, strict=True)]
    documents = [[PADDING] * gap + [TEXT] * (longest - gap) for gap in gaps]
    return torch.tensor(tokens, device=device), torch.tensor(documents, device=device)


def draw(logits_V: Tensor, text: Sequence[int], sampling: Sampling, generator: torch.Generator) -> int:
    """One token from logits [V], float32 on the CPU, that follows `text`."""
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(text)))
        there = logits_V[seen]
        logits_V = logits_V.clone()
        logits_V[seen] = torch.where(
            there > 0, there / sampling.repetition_penalty, there * sampling.repetition_penalty
        )
    if sampling.temperature == 0.0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(sampling.top_k).values[-1], -math.inf)
    if sampling.top_p is not None:
        probs_V, order_V = logits_V.softmax(-1).sort(descending=True, stable=True)
        beyond_V = probs_V.cumsum(-1) - probs_V >= sampling.top_p  # what lies before them reaches p already
        logits_V = logits_V.index_fill(0, order_V[beyond_V], -math.inf)
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))
