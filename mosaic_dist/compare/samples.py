"""A few texts that a run's model writes, for a look."""

from typing import NamedTuple

import torch

from mosaic_dist.compare.history import RunHistory
from mosaic_dist.data.tokenizer import FILE_NAME, Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.generate import Sampling, generate
from mosaic_dist.evaluate.model_source import ModelSource
from mosaic_dist.model import TransformerModel

SAMPLE_TOKENS = 100
SAMPLING = Sampling(temperature=0.8, top_k=50)
LARGEST_BYTES = 16 << 30
"""Of weights in float32: a larger model is not read on the way."""


class Samples(NamedTuple):
    """Texts, and which weights they are from; or none, and why."""

    source: str
    texts: list[str]


def write_samples(story: RunHistory, count: int, prompt: str, model: str | None) -> Samples:
    """Continue a prompt, or begin documents where it is empty, with an exported model or the newest checkpoint.

    UserError for a model that was asked for and cannot be read; what else is missing is told in the place of the texts.
    """
    file = story.path / FILE_NAME
    if not file.exists():
        return Samples(f"No samples: {file} is missing.", [])
    needed = 4 * story.parameters
    if needed > LARGEST_BYTES:
        return Samples(f"No samples: the weights would take {needed / 1e9:,.0f} GB.", [])
    try:
        opened = ModelSource(model=model or "", run="" if model else str(story.path)).open()
        source = model or f"The checkpoint of step {opened.facts['step']:,}"
        network = opened.network(torch.device("cpu"))
    except UserError as error:
        if model:
            raise
        return Samples(f"No samples: {error}.", [])
    how = f"temperature {SAMPLING.temperature:g}, the {SAMPLING.top_k} likeliest tokens, up to {SAMPLE_TOKENS} tokens."
    return Samples(f"{source}, {how}", continuations(network, Tokenizer.load(file), count, prompt))


def continuations(network: TransformerModel, tokenizer: Tokenizer, count: int, prompt: str) -> list[str]:
    """So many texts of up to SAMPLE_TOKENS tokens behind the prompt, drawn by SAMPLING; the prompt is part of them."""
    begin = tokenizer.encode_prompt(prompt) or [tokenizer.eos_id]  # behind the end of a document another one begins
    written: list[list[int]] = [[] for _ in range(count)]
    for step in generate(network, [begin] * count, SAMPLE_TOKENS, SAMPLING, tokenizer.stop_ids):
        for tokens, token in zip(written, step, strict=True):
            if token is not None:
                tokens.append(token)
    return [tokenizer.decode(begin + tokens) for tokens in written]
