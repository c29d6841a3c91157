"""Documents -> tokens -> fixed-length samples in MDS shards, which appear whole under their name or not at all.

One process reads, chooses, packs and writes, in the order of the documents; the others only tokenise. So the bytes do
not depend on their number, and one cursor is all that there is to know of an unfinished preparation. With two workers
the one process took 6 of 100 CPU seconds, its imports included (packing and writing: 66 million tokens per CPU second);
by that it keeps up with about 15 workers, which nobody has tried.
"""

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import xxhash
from tqdm import tqdm

from mosaic_dist.data import mds
from mosaic_dist.data.dataset import DatasetInfo, SourceInfo
from mosaic_dist.data.documents import Mark
from mosaic_dist.data.encode import (
    PIECE_CHARACTERS,
    TRAIN,
    VALIDATION,
    Encoded,
    encode_documents,
    token_dtype,
)
from mosaic_dist.data.journal import SEEN, Journal
from mosaic_dist.data.packing import Packer
from mosaic_dist.data.publish import DATA, SHARD_BYTES, unfinished, write_description
from mosaic_dist.data.selection import Seen, Selection
from mosaic_dist.data.sources import Documents, given_documents
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError

LOG_SECONDS = 30.0  # between progress lines where stderr is a file


def prepare(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    output: str | Path,
    seq_len: int,
    *,
    validation_fraction: float = 0.005,
    min_document_bytes: int = 0,
    max_document_bytes: int | None = None,
    deduplicate: bool = False,
    add_bos_token: bool = False,
    workers: int | None = None,
    compression: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> DatasetInfo:
    """Tokenise documents, pack them into samples of seq_len + 1 tokens and publish the dataset at `output`.

    Documents are joined with an EOS after each, and with `add_bos_token` a BOS before each. Sample i of a split holds
    tokens i*seq_len to (i+1)*seq_len, both included: neighbours share one token, so each token but the first is
    predicted exactly once. The tail that does not fill a sample is dropped and counted. The bytes written do not depend
    on `workers` (None: one per core).

    Documents shorter or longer than the limits (bytes of UTF-8) are left out, and with `deduplicate` all but the first
    one of equal texts; both are counted. A document's split follows from the hash of its text. Where the corpus is so
    small that no sample falls to validation, the last sample of the training split becomes the validation split
    (`options.validation_from_train`).

    If it is killed, the same call goes on from the last entry in its journal, and ends with the bytes of an undisturbed
    run; this needs `documents` from `sources`. Another call for the same output is refused unless `restart` throws the
    progress away. An existing output is refused, or with `overwrite` replaced once the new one is whole. Raises
    UserError also when the text does not fill one sample of every split.
    """
    output = Path(output).expanduser()
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    _check_options(seq_len, validation_fraction, workers, compression)
    if add_bos_token:
        tokenizer = tokenizer.adding_bos()  # so that prompts begin as documents do
    source = documents if isinstance(documents, Documents) else given_documents(documents)
    options = {
        "validation_fraction": validation_fraction,
        "min_document_bytes": min_document_bytes,
        "max_document_bytes": max_document_bytes,
        "deduplicate": deduplicate,
        "add_bos_token": add_bos_token,
        "compression": compression,
        "shard_bytes": shard_bytes,
    }
    with unfinished(output, overwrite) as aside:
        journal = Journal(aside, _command(source, tokenizer, seq_len, options), restart=restart)
        names = (TRAIN, VALIDATION) if validation_fraction > 0 else (TRAIN,)
        dtype = token_dtype(tokenizer.vocab_size)
        packers = {name: Packer(aside / DATA / name, seq_len, dtype, compression, shard_bytes) for name in names}
        journal.resume(packers)
        seen = Seen(aside / SEEN, journal.mark.documents) if deduplicate else None
        selection = Selection(source, min_document_bytes, max_document_bytes, seen, journal.mark)
        counts = journal.counts or [{"documents": 0, "text_bytes": 0, "tokens": 0} for _ in source.sources or [""]]
        with Progress(source, journal.mark) as progress:
            batches = encode_documents(selection, tokenizer, validation_fraction, workers, add_bos_token)
            for number, mark, encoded in batches:
                for part in encoded:
                    packers[part.split].add(part)
                    _count(counts[number], part)
                if journal.is_due():
                    journal.save(mark, counts, packers, seen)
                progress.add(mark, encoded)
        _finish(aside / DATA, packers, tokenizer, source, selection, counts, options)
    return DatasetInfo.load(output)


def _finish(
    folder: Path,
    packers: dict[str, Packer],
    tokenizer: Tokenizer,
    source: Documents,
    selection: Selection,
    counts: list[dict[str, int]],
    options: dict[str, Any],
) -> None:
    """Write what is left of each split, and the description of all."""
    options = {"validation_from_train": _fill_splits(packers)} | options
    info = DatasetInfo(
        path=folder,
        seq_len=packers[TRAIN].seq_len,
        dtype=packers[TRAIN].dtype.name,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.digest,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id if options["add_bos_token"] else None,
        options=options,
        splits={name: packer.finish() for name, packer in packers.items()},
        sources=[_source_info(name, found) for name, found in zip(source.sources, counts, strict=False)],
        skipped_files=source.skipped,
        empty_documents=source.empty,
        filtered_documents=selection.filtered,
        duplicate_documents=selection.duplicates,
    )
    write_description(info, tokenizer)


def _check_options(seq_len: int, validation_fraction: float, workers: int, compression: str | None) -> None:
    if seq_len < 1:
        raise UserError(f"seq_len ({seq_len}) must be at least 1")
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction ({validation_fraction}) must be at least 0 and less than 1")
    if workers < 1:
        raise UserError(f"workers ({workers}) must be at least 1")
    mds.check_compression(compression)


def _command(source: Documents, tokenizer: Tokenizer, seq_len: int, options: dict[str, Any]) -> dict[str, Any] | None:
    """All that the bytes of the dataset depend on; None where the texts may be others the next time."""
    identity = source.identity()
    software = {"tokenizers": tokenizers.__version__, "piece_characters": PIECE_CHARACTERS}
    words = {
        "tokenizer": tokenizer.digest,
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id,
        "tokenizer_files": {
            name: xxhash.xxh3_128_hexdigest(text.encode()) for name, text in tokenizer.companions().items()
        },
    }
    made = {"seq_len": seq_len} | words | options | software
    return identity and made | identity


def _count(counts: dict[str, int], part: Encoded) -> None:
    counts["documents"] += part.documents
    counts["text_bytes"] += part.text_bytes
    counts["tokens"] += len(part.tokens)


def _source_info(name: str, counts: dict[str, int]) -> SourceInfo:
    return SourceInfo(
        name=name, documents=counts["documents"], text_bytes=counts["text_bytes"], tokens=counts["tokens"]
    )


def _fill_splits(packers: dict[str, Packer]) -> bool:
    """See that every split has a sample, or raise UserError; True if validation's had to come from train."""
    train, validation = packers[TRAIN], packers.get(VALIDATION)
    moved = validation is not None and not validation.samples and train.samples > 1
    if validation is not None and moved:
        validation.moved = train.give_last()
    if not all(packer.samples for packer in packers.values()):
        counts = " and ".join(f"{packer.samples} of {name}" for name, packer in packers.items())
        raise UserError(
            f"{sum(packer.text_bytes for packer in packers.values()):,} bytes of text give {counts} samples of seq_len "
            f"+ 1 = {train.seq_len + 1} tokens, and each split needs one: give more text or a smaller seq_len"
        )
    return moved


class Progress:
    """Progress bar in bytes of input, or in documents where their size is unknown, with rates of tokens and documents.

    Where stderr is no terminal, a line every LOG_SECONDS and none for runs shorter than that. A run that goes on says
    so, and its rates and remaining time are its own.
    """

    def __init__(self, source: Documents, start: Mark):
        self.total = source.total_bytes
        self.tokens, self.first = 0, start.documents
        quiet = not sys.stderr.isatty()
        if start.documents:
            share = f" ({start.place.done_bytes / self.total:.1%})" if self.total else ""
            print(f"going on behind document {start.documents:,}{share}", file=sys.stderr, flush=True)
        self.bar: Any = tqdm(
            desc="tokenising",
            total=self.total or None,
            initial=self._position(start),
            unit="B" if self.total else " documents",
            unit_scale=True,
            mininterval=LOG_SECONDS if quiet else 0.2,
            delay=LOG_SECONDS if quiet else 0,
            leave=not quiet,
        )
        self.start = time.perf_counter()

    def _position(self, mark: Mark) -> int:
        return mark.place.done_bytes if self.total else mark.documents

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def add(self, mark: Mark, encoded: list[Encoded]) -> None:
        """Count a batch that is packed."""
        self.tokens += sum(len(part.tokens) for part in encoded)
        seconds = max(time.perf_counter() - self.start, 1e-9)
        done = mark.documents - self.first
        documents = f", {done / seconds:,.0f} documents/s" if self.total else ""  # else the bar's own rate
        self.bar.set_postfix_str(f"{self.tokens / seconds:,.0f} tokens/s{documents}", refresh=False)
        self.bar.update(self._position(mark) - self.bar.n)
