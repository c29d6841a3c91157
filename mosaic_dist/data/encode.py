"""Documents to token arrays, by a pool of processes, in order and in bounded memory.

Light imports only: each worker process imports this file.
"""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import xxhash

from mosaic_dist.data.tokenizer import Tokenizer, no_threads
from mosaic_dist.errors import UserError

BATCH_BYTES = 1 << 20  # of text; a longer document is a batch of its own
BATCH_DOCUMENTS = 8192
TRAIN, VALIDATION = "train", "validation"


@dataclasses.dataclass
class Encoded:
    """Tokens of the documents of one batch that belong to one split, an EOS after each document."""

    split: str
    tokens: np.ndarray
    documents: int
    text_bytes: int


def split_of(text: bytes, validation_fraction: float) -> str:
    """The split of a document: by the hash of its text, so it stays when others come or go, and copies go along."""
    return VALIDATION if xxhash.xxh3_64_intdigest(text) < validation_fraction * 2.0**64 else TRAIN


def token_dtype(vocab_size: int) -> str:
    """The smallest type that is used for token ids on disk."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def encode_batch(tokenizer: Tokenizer, texts: list[str], validation_fraction: float) -> list[Encoded]:
    """Tokens of a batch by split, documents in order; splits without a document are left out."""
    dtype = token_dtype(tokenizer.vocab_size)
    parts: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    sizes: collections.Counter[str] = collections.Counter()
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        data = text.encode()
        split = split_of(data, validation_fraction)
        sizes[split] += len(data)
        parts[split].append(np.array([*ids, tokenizer.eos_id], dtype))
    return [Encoded(split, np.concatenate(found), len(found), sizes[split]) for split, found in parts.items()]


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents to about BATCH_BYTES of text; the length in characters stands for the bytes."""
    batch: list[str] = []
    size = 0
    for text in documents:
        if batch and (size + len(text) > BATCH_BYTES or len(batch) == BATCH_DOCUMENTS):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def encode_documents(
    documents: Iterable[str], tokenizer: Tokenizer, validation_fraction: float, workers: int
) -> Iterator[Encoded]:
    """Tokens of all documents, in order whatever the number of workers; one worker means this process.

    At most 2 batches per worker are in flight. The first failure, here or in a worker, ends everything.
    """
    if workers == 1:
        for texts in batches(documents):
            yield from encode_batch(tokenizer, texts, validation_fraction)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        # Not fork: the tokenizer's and pyarrow's threads of this process would be lost in the child, locks held.
        mp_context=multiprocessing.get_context("forkserver"),
        initializer=_start_worker,
        initargs=(tokenizer.to_json(), validation_fraction),
    )
    try:
        pending: collections.deque[concurrent.futures.Future[list[Encoded]]] = collections.deque()
        for texts in batches(documents):
            pending.append(pool.submit(_work, texts))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a tokenising worker was killed, most likely for memory: use fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Tokenizer, float] | None = None


def _start_worker(tokenizer_json: str, validation_fraction: float) -> None:
    global _worker
    no_threads()
    _worker = Tokenizer(tokenizer_json), validation_fraction
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the main process is gone: a pool's workers outlive a kill -9 of it otherwise."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes only"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(texts: list[str]) -> list[Encoded]:
    assert _worker is not None, "_start_worker runs first"
    tokenizer, validation_fraction = _worker
    return encode_batch(tokenizer, texts, validation_fraction)
