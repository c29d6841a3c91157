"""The documents whose text is scored: of files, of a prepared dataset, or of a Hugging Face dataset."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mosaic_dist.data.arithmetic import read_rows
from mosaic_dist.data.dataset import DATASET_NAME, DatasetInfo
from mosaic_dist.data.encode import VALIDATION, pieces
from mosaic_dist.data.shards import Shards
from mosaic_dist.data.sources import STDLIB, hugging_face_documents, read_documents
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError

READ_SAMPLES = 256  # at a time


class Known(NamedTuple):
    """A dataset that goes by a short name. Its rows are paragraphs of one document, with `between` between them."""

    name: str
    between: str


KNOWN = {
    "wikitext2": Known("Salesforce/wikitext:wikitext-2-raw-v1", "\n\n"),
    "wikitext103": Known("Salesforce/wikitext:wikitext-103-raw-v1", "\n\n"),
}
"""Joined as published perplexities are measured: https://huggingface.co/docs/transformers/perplexity."""


class Passage(NamedTuple):
    """A document's tokens, uint32 [N], without BOS or EOS, and the bytes of its text in UTF-8."""

    tokens: np.ndarray
    text_bytes: int


class Place(NamedTuple):
    """What a data word means: a prepared dataset, or texts."""

    dataset: DatasetInfo | None
    texts: Iterable[str]


def find(data: str, split: str | None, field: str) -> Place:
    """Look at what `data` names. UserError for what is not there, and for a split of what has none.

    That is a folder made by a tool of data_prep; else a file, folder or glob of texts, or `stdlib`; else a dataset
    that the package `datasets` loads, as NAME or NAME:CONFIG. `split` None is "validation".
    """
    path = Path(data).expanduser()
    if (path / DATASET_NAME).exists():
        info = DatasetInfo.load(path)
        info.split(split or VALIDATION)
        if info.answer_loss is None:
            return Place(info, ())
        return Place(None, [row.text for row in read_rows(path, split or VALIDATION)])
    if data == STDLIB or path.exists() or any(letter in data for letter in "*?["):
        if split is not None:
            raise UserError(f"split {split!r} is of a dataset, and {data} is text: leave it out")
        return Place(None, read_documents([data], field))
    if data in KNOWN:
        return Place(None, [_as_one_text(KNOWN[data], split or VALIDATION, field)])
    texts = hugging_face_documents(data, split or VALIDATION, field)
    try:
        texts.identity()  # asks for the dataset now
    except UserError as error:
        raise UserError(f"there is no file or folder {data}, and it cannot be loaded by its name: {error}") from None
    return Place(None, texts)


def _as_one_text(known: Known, split: str, field: str) -> str:
    """All rows, the empty ones too, which `hugging_face_documents` leaves out."""
    import datasets  # here, because it takes two seconds that only this function needs

    path, _, config = known.name.partition(":")
    try:
        return known.between.join(datasets.load_dataset(path, config or None, split=split)[field])
    except Exception as error:  # of many kinds, for the hub, the network and the files
        raise UserError(f"dataset {known.name}, split {split}: {type(error).__name__}: {error}") from error


def read_passages(
    place: Place, split: str | None, tokenizer: Tokenizer, limit: int | None, rank: int, size: int
) -> Iterator[Passage]:
    """The documents of one rank: of the first `limit` (None: of all) number i is of rank i % size.

    Text is cut for the tokenizer where data_prep cuts it, so that tokens are the same. Bytes of a prepared dataset are
    those of the decoded tokens; a document that its split's end has cut counts as far as it is there.
    """
    if place.dataset is not None:
        check_tokenizer(place.dataset, tokenizer)
        info = place.dataset
        documents = split_at(stream(info, split or VALIDATION), info.eos_id, info.bos_id)
        for tokens in itertools.islice(documents, rank, limit, size):
            yield Passage(tokens, len(tokenizer.decode(tokens, False).encode()))
        return
    for text in itertools.islice(place.texts, rank, limit, size):
        ids = itertools.chain.from_iterable(tokenizer.encode(piece) for piece in pieces(text))
        yield Passage(np.fromiter(ids, np.uint32), len(text.encode()))


def check_tokenizer(info: DatasetInfo, tokenizer: Tokenizer) -> None:
    """UserError where the model knows other tokens than those of the dataset."""
    if info.tokenizer != tokenizer.digest and not tokenizer.has_ids_of(info.load_tokenizer()):
        raise UserError(
            f"the data of {info.path} was made with tokenizer {info.tokenizer}, and the model's is {tokenizer.digest}: "
            "give the text itself as --data"
        )


def stream(info: DatasetInfo, split: str) -> Iterator[np.ndarray]:
    """All tokens of a split, in order, in chunks [N]. Neighbouring samples share a token; here it comes once."""
    shards = Shards(info, split)
    for first in range(0, len(shards), READ_SAMPLES):
        tokens_BT = shards.read(np.arange(first, min(first + READ_SAMPLES, len(shards))))
        yield tokens_BT[:, :-1].ravel()
    yield tokens_BT[-1, -1:]


def split_at(chunks: Iterable[np.ndarray], end_id: int, begin_id: int | None = None) -> Iterator[np.ndarray]:
    """The documents [N] of a stream, without the tokens that begin and end each; empty ones are left out.

    The caller gives each document its first context, whether the stream has a BOS there or not.
    """
    kept: list[np.ndarray] = []
    for chunk in chunks:
        *whole, rest = np.split(chunk, np.flatnonzero(chunk == end_id))
        for tokens in whole:
            kept.append(tokens)
            yield from _joined(kept, end_id, begin_id)
            kept = []
        kept.append(rest)
    yield from _joined(kept, end_id, begin_id)


def _joined(parts: list[np.ndarray], end_id: int, begin_id: int | None) -> Iterator[np.ndarray]:
    tokens = np.concatenate(parts).astype(np.uint32)
    tokens = tokens[tokens != end_id]  # np.split leaves an end at the front of what follows it
    tokens = tokens[1:] if tokens[:1].tolist() == [begin_id] else tokens
    if len(tokens):
        yield tokens
