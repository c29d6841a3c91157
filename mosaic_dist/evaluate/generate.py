"""Text from a model, token by token."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mosaic_dist.errors import UserError
from mosaic_dist.model import TransformerModel


@torch.no_grad()
def generate(
    model: TransformerModel,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    stop_token: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield token ids that continue `prompt` until `stop_token` (not yielded) or `max_new_tokens`.

    Temperature 0 takes the most likely token; otherwise one is drawn from the `top_k` most likely (None: all). Once
    the sequence is longer than the model's context, the model sees its end only.
    """
    if not prompt:
        raise UserError("the prompt has no tokens; give at least one character")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-model.spec.context :]])
        token = choose(model(window)[0, -1].float(), temperature, top_k, generator)
        if token == stop_token:
            return
        tokens.append(token)
        yield token


def choose(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """Draw one token from logits [V]."""
    if temperature == 0.0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        values, indices = logits_V.topk(top_k)
    else:
        values, indices = logits_V, torch.arange(len(logits_V))
    drawn = torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)
    return int(indices[drawn])
