"""Documents that a tokenizer does not learn from, and how well it does on them."""

from collections.abc import Iterable, Iterator, Sequence

from mosaic_dist.data.encode import BATCH_BYTES, TRAIN, pieces, split_of
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError

KEPT_BYTES = 1 << 26  # of held-out text: more does not move the figures, and it is held in memory


class HeldOut:
    """The texts to learn from, to be iterated; a share of the documents, chosen as prepare() chooses, is left out.

    `texts` are the first of those, up to KEPT_BYTES of them, and `documents` counts all documents that were met.
    """

    def __init__(self, documents: Iterable[str], fraction: float):
        if not 0 <= fraction < 1:
            raise UserError(f"held_out ({fraction}) must be at least 0 and less than 1")
        self._documents, self._fraction = documents, fraction
        self.texts: list[str] = []
        self.text_bytes = self.documents = 0

    def __iter__(self) -> Iterator[str]:
        self.texts, self.text_bytes, self.documents = [], 0, 0
        for text in self._documents:
            self.documents += 1
            data = text.encode()
            if split_of(data, self._fraction) == TRAIN:
                yield text
            elif not self.texts or self.text_bytes + len(data) <= KEPT_BYTES:
                self.texts.append(text)
                self.text_bytes += len(data)


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Tokens of the texts, without the EOS that would be put between them."""
    tokens, batch, size = 0, list[str](), 0
    for piece in (piece for text in texts for piece in pieces(text)):
        batch.append(piece)
        size += len(piece)
        if size > BATCH_BYTES:
            tokens += sum(map(len, tokenizer.encode_batch(batch)))
            batch, size = [], 0
    return tokens + sum(map(len, tokenizer.encode_batch(batch)))


def comparison(tokenizers: Sequence[tuple[str, Tokenizer]], texts: Sequence[str]) -> str:
    """A table of bytes per token of several named tokenizers on the same texts."""
    text_bytes = sum(len(text.encode()) for text in texts)
    width = max(len("tokenizer"), *(len(name) for name, _ in tokenizers))
    lines = [f"{'tokenizer':<{width}}  vocabulary        tokens  bytes per token"]
    for name, tokenizer in tokenizers:
        tokens = count_tokens(tokenizer, texts)
        rate = text_bytes / max(tokens, 1)
        lines.append(f"{name:<{width}}  {tokenizer.vocab_size:>10,}  {tokens:>12,}  {rate:>15.3f}")
    return "\n".join(lines)
