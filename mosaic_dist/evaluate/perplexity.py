"""Perplexity and bits per byte of text, by a sliding window over each document."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.evaluation import Evaluation
from mosaic_dist.evaluate.model_source import Dtype, LoadedModel
from mosaic_dist.evaluate.passages import Passage, find, read_passages
from mosaic_dist.evaluate.ranks import sum_over_ranks
from mosaic_dist.evaluate.windows import batches, windows
from mosaic_dist.model import TransformerModel
from mosaic_dist.parallel import World
from mosaic_dist.spec import Positive
from mosaic_dist.targets import IGNORE_INDEX


class Perplexity(Evaluation, type="perplexity"):
    """How well a model tells the tokens of `data` (see `passages.find`), each document by itself.

    Every token of the text is scored once. Before each document stands one token that is not scored: BOS where the
    tokenizer asks for one, else EOS, as the data preparation puts between documents; the EOS behind a document is not
    scored. Windows take `context` tokens (None: the model's), each `stride` (None: half of that) behind the one before.
    """

    data: str
    split: str | None = None
    field: str = "text"
    context: Positive | None = None
    stride: Positive | None = None
    limit: Positive | None = None
    batch: Positive = 8
    dtype: Dtype = "fp32"

    def made_on(self) -> str:
        """The data word, and the split if one was named."""
        return self.data if self.split is None else f"{self.data} ({self.split})"

    def measure(self, opened: LoadedModel, world: World) -> dict[str, Any]:
        """Measure the loss of every token. Ranks share the documents; each holds the whole model."""
        network = opened.network(world.device, self.dtype)
        context, stride = self._reach(network.spec.max_seq_len)

        def score() -> Tensor:
            tokenizer = opened.tokenizer
            if tokenizer.vocab_size > network.spec.vocab_size:
                raise UserError(
                    f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model ({network.spec.vocab_size})"
                )
            found = read_passages(
                find(self.data, self.split, self.field), self.split, tokenizer, self.limit, world.rank, world.size
            )
            quiet = None if world.is_main else True
            passages = list(tqdm(found, desc="tokenising", unit=" documents", disable=quiet))
            return add_up(network, passages, first_token(tokenizer), context, stride, self.batch, quiet)

        nats, tokens, text_bytes, documents = sum_over_ranks(world, score).tolist()
        figures = describe(nats, int(tokens), int(text_bytes), int(documents))
        layout = {"context": context, "stride": stride, "dtype": self.dtype}
        return figures | {"task": "perplexity"} | opened.facts | {"data": self.data, "split": self.split} | layout

    def _reach(self, longest: int) -> tuple[int, int]:
        """Context and stride. UserError for those that the model cannot have."""
        context = self.context or longest
        if context > longest:
            raise UserError(f"context ({context}) is more than the model's ({longest})")
        stride = self.stride or max(1, context // 2)
        if stride > context:
            raise UserError(f"stride ({stride}) is more than the context ({context}), so tokens would be left out")
        return context, stride

    def measures(self, figures: Mapping[str, Any]) -> dict[str, float]:
        """The numbers that comparisons show."""
        return {key.replace("_", " "): figures[key] for key in ("perplexity", "nats_per_token", "bits_per_byte")}


def first_token(tokenizer: Tokenizer) -> int:
    """What stands before a document: BOS where the tokenizer asks for one, else the EOS of the document before."""
    return (tokenizer.encode_prompt("") or [tokenizer.eos_id])[0]


@torch.inference_mode()
def add_up(
    network: TransformerModel,
    passages: list[Passage],
    start: int,
    context: int,
    stride: int,
    batch: int,
    quiet: bool | None,
) -> Tensor:
    """Nats of all tokens, the tokens, bytes and documents, float64 [4]. Sums of a batch are float32, of all float64."""
    device = next(network.parameters()).device
    nats = 0.0
    total = sum(len(passage.tokens) for passage in passages)
    found = itertools.chain.from_iterable(windows(passage.tokens, start, context, stride) for passage in passages)
    with tqdm(total=total, desc="scoring", unit=" tokens", unit_scale=True, disable=quiet) as bar:
        for inputs_BT, targets_BT in batches(found, batch):
            parts = network(inputs_BT.to(device), targets_BT.to(device))
            nats += parts.cross_entropy_sum.item()
            bar.update(int((targets_BT != IGNORE_INDEX).sum()))
    sizes = [total, sum(passage.text_bytes for passage in passages), len(passages)]
    return torch.tensor([nats, *sizes], dtype=torch.float64)


def describe(nats: float, tokens: int, text_bytes: int, documents: int) -> dict[str, Any]:
    """The figures of a sum. UserError where there are none."""
    if not tokens or not math.isfinite(nats):
        raise UserError(f"the model gave {nats} nats for {tokens} tokens of {documents} documents")
    return {
        "perplexity": math.exp(nats / tokens),
        "nats_per_token": nats / tokens,
        "bits_per_token": nats / tokens / math.log(2),
        "bits_per_byte": nats / text_bytes / math.log(2),
        "tokens": tokens,
        "bytes": text_bytes,
        "documents": documents,
    }
