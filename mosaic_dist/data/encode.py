"""Documents to token arrays, by a pool of processes, in order and in bounded memory.

A long document is encoded in pieces, because the tokenizer needs about 100 bytes for each byte of text at a time.

Light imports only: each worker process imports this file.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import xxhash

from mosaic_dist.data.documents import Chosen, Mark
from mosaic_dist.data.tokenizer import Tokenizer, no_threads
from mosaic_dist.errors import UserError

BATCH_BYTES = 1 << 20  # of text; a longer document is a batch of its own
BATCH_DOCUMENTS = 8192
PIECE_CHARACTERS = 1 << 20  # that are encoded at a time: part of what makes the tokens
# A new line behind the end of another: the splitting rules of GPT-2, GPT-4 and Llama 3 all end a piece of text there.
LINE_START = re.compile(r"(?<=\S\n)(?=\S)")
TRAIN, VALIDATION = "train", "validation"


@dataclasses.dataclass
class Batch:
    """Texts of one input that are encoded together, and the mark behind them."""

    texts: list[str]
    source: int
    mark: Mark
    characters: int


@dataclasses.dataclass
class Encoded:
    """Tokens of the documents of one batch that belong to one split: [BOS,] text, EOS of each."""

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


def pieces(text: str) -> Iterator[str]:
    """A text cut to at most PIECE_CHARACTERS: at a line's start, or where there is none, at any character.

    The cuts depend on the text alone. Byte-level tokenizers give the same tokens for a text cut at lines as for the
    whole; a cut within a line, and tokenizers that mark the start of a text (SentencePiece's do), may change the few
    tokens beside it.
    """
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        end = limit = begin + PIECE_CHARACTERS
        for stop in range(limit, begin, -1024):  # mostly the first: lines are short
            starts = [found.start() for found in LINE_START.finditer(text, max(stop - 1024, begin + 1), stop)]
            if starts:
                end = starts[-1]
                break
        yield text[begin:end]
        begin = end
    yield text[begin:]


def encode_batch(
    tokenizer: Tokenizer, texts: list[str], validation_fraction: float, add_bos_token: bool = False
) -> list[Encoded]:
    """Tokens of a batch by split, documents in order; splits without a document are left out.

    UserError for a text that encodes to the EOS, which can only happen if that is not a special token.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    begin = np.array([tokenizer.bos_id] if add_bos_token else [], dtype)
    parts: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    documents: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    is_short = max(map(len, texts)) <= PIECE_CHARACTERS
    encoded = tokenizer.encode_batch(texts) if is_short else [None] * len(texts)
    for text, ids in zip(texts, encoded, strict=True):
        data = text.encode()
        split = split_of(data, validation_fraction)
        documents[split] += 1
        sizes[split] += len(data)
        parts[split].append(begin)
        if ids is None:
            parts[split] += [np.array(tokenizer.encode(piece), dtype) for piece in pieces(text)]
            ids = []
        ids.append(tokenizer.eos_id)
        parts[split].append(np.array(ids, dtype))
    found = [Encoded(split, np.concatenate(ids), documents[split], sizes[split]) for split, ids in parts.items()]
    for part in found:
        if np.count_nonzero(part.tokens == tokenizer.eos_id) != part.documents:
            raise UserError(
                f"a document contains text that encodes to the end-of-document token {tokenizer.tokens['eos_token']!r} "
                f"(id {tokenizer.eos_id}), which is not a special token, and would be split there: name another --eos"
            )
    return found


def batches(documents: Iterable[Chosen]) -> Iterator[Batch]:
    """Group documents of one input to about BATCH_BYTES of text; the length in characters stands for the bytes."""
    batch: Batch | None = None
    for text, source, mark in documents:
        if batch is not None and (
            batch.characters + len(text) > BATCH_BYTES or len(batch.texts) == BATCH_DOCUMENTS or source != batch.source
        ):
            yield batch
            batch = None
        if batch is None:
            batch = Batch([], source, mark, 0)
        batch.texts.append(text)
        batch.mark = mark
        batch.characters += len(text)
    if batch is not None:
        yield batch


def encode_documents(
    documents: Iterable[Chosen],
    tokenizer: Tokenizer,
    validation_fraction: float,
    workers: int,
    add_bos_token: bool = False,
) -> Iterator[tuple[int, Mark, list[Encoded]]]:
    """Input, mark and tokens of each batch, in order whatever the number of workers; one worker means this process.

    At most 2 batches per worker are in flight, and beyond 2 * BATCH_BYTES of text per worker only one more. The first
    failure, here or in a worker, ends everything.
    """
    if workers == 1:
        for batch in batches(documents):
            encoded = encode_batch(tokenizer, batch.texts, validation_fraction, add_bos_token)
            yield batch.source, batch.mark, encoded
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        # Not fork: the tokenizer's and pyarrow's threads of this process would be lost in the child, locks held.
        mp_context=multiprocessing.get_context("forkserver"),
        initializer=_start_worker,
        initargs=(tokenizer, validation_fraction, add_bos_token),
    )
    pending: collections.deque[tuple[Batch, concurrent.futures.Future[list[Encoded]]]] = collections.deque()

    def take() -> tuple[int, Mark, list[Encoded]]:
        batch, future = pending.popleft()
        return batch.source, batch.mark, future.result()

    try:
        for batch in batches(documents):
            with _interrupts_wait():
                future = pool.submit(_work, batch.texts)
            batch.texts = []  # the pool holds them as long as they are needed
            pending.append((batch, future))
            while len(pending) > 2 * workers or _characters(pending) > 2 * workers * BATCH_BYTES:
                yield take()
        while pending:
            yield take()
    except BrokenProcessPool:
        raise UserError("a tokenising worker was killed, most likely for memory: use fewer --workers") from None
    finally:
        with _interrupts_wait():
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C take effect at the end of the block.

    A process that was started but is not in the pool's list yet would never be ended, and the exit would wait for it.
    Processes inherit the mask, so Ctrl-C cannot reach them before `_start_worker` ignores it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(came[0])


def _characters(pending: Iterable[tuple[Batch, Any]]) -> int:
    return sum(batch.characters for batch, _ in pending)


_encode: Callable[[list[str]], list[Encoded]] | None = None


def _start_worker(tokenizer: Tokenizer, validation_fraction: float, add_bos_token: bool) -> None:
    global _encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches all; the main process ends its workers
    no_threads()
    _encode = functools.partial(
        encode_batch, tokenizer, validation_fraction=validation_fraction, add_bos_token=add_bos_token
    )
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the main process is gone: a pool's workers outlive a kill -9 of it otherwise."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes only"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(texts: list[str]) -> list[Encoded]:
    assert _encode is not None, "_start_worker runs first"
    return _encode(texts)
