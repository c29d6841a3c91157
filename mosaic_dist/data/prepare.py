"""Documents -> tokens -> fixed-length samples in MDS shards, which appear whole under their name or not at all."""

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mosaic_dist.data import mds
from mosaic_dist.data.dataset import DatasetInfo, SplitInfo
from mosaic_dist.data.encode import TRAIN, VALIDATION, Encoded, encode_documents, token_dtype
from mosaic_dist.data.publish import SHARD_BYTES, finish_split, new_dataset, write_description
from mosaic_dist.data.sources import Documents
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
    workers: int | None = None,
    compression: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> DatasetInfo:
    """Tokenise documents, pack them into samples of seq_len + 1 tokens and publish the dataset at `output`.

    Documents are joined with an EOS after each. Sample i of a split holds tokens i*seq_len to (i+1)*seq_len, both
    included: neighbours share one token, so each token but the first is predicted exactly once. The tail that does
    not fill a sample is dropped and counted. The bytes written do not depend on `workers` (None: one per core).

    A document's split follows from the hash of its text. Where the corpus is so small that no sample falls to
    validation, the last sample of the training split becomes the validation split (`options.validation_from_train`).

    An existing output is refused, or with `overwrite` replaced once the new one is whole. Raises UserError also when
    the text does not fill one sample of every split.
    """
    output = Path(output).expanduser()
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    _check_options(seq_len, validation_fraction, workers, compression)
    with new_dataset(output, overwrite) as aside:
        names = (TRAIN, VALIDATION) if validation_fraction > 0 else (TRAIN,)
        packers = {name: Packer(aside / name, seq_len, tokenizer, compression, shard_bytes) for name in names}
        with Progress(documents) as progress:
            for encoded in encode_documents(documents, tokenizer, validation_fraction, workers):
                packers[encoded.split].add(encoded)
                progress.add(encoded)
        options = {
            "validation_fraction": validation_fraction,
            "validation_from_train": _fill_splits(packers),
            "compression": compression,
            "shard_bytes": shard_bytes,
        }
        info = _describe(aside, documents, tokenizer, seq_len, packers, options)
        write_description(info, tokenizer)
    return DatasetInfo.load(output)


def _describe(
    folder: Path,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    seq_len: int,
    packers: "dict[str, Packer]",
    options: dict[str, Any],
) -> DatasetInfo:
    """Finish the splits; what dataset.json says of them."""
    source = documents if isinstance(documents, Documents) else None
    return DatasetInfo(
        path=folder,
        seq_len=seq_len,
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.digest,
        eos_id=tokenizer.eos_id,
        splits={name: packer.finish() for name, packer in packers.items()},
        options=options,
        sources=source.sources if source else [],
        skipped_files=len(source.skipped) if source else 0,
        empty_documents=source.empty if source else 0,
    )


def _check_options(seq_len: int, validation_fraction: float, workers: int, compression: str | None) -> None:
    if seq_len < 1:
        raise UserError(f"seq_len ({seq_len}) must be at least 1")
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction ({validation_fraction}) must be at least 0 and less than 1")
    if workers < 1:
        raise UserError(f"workers ({workers}) must be at least 1")
    mds.check_compression(compression)


class Packer:
    """Cuts a stream of tokens into overlapping samples of seq_len + 1 and writes them as one split.

    The newest sample is held back, so that it can still be given to another split.
    """

    def __init__(self, folder: Path, seq_len: int, tokenizer: Tokenizer, compression: str | None, shard_bytes: int):
        self.folder, self.seq_len = folder, seq_len
        self.samples = self.documents = self.text_bytes = 0
        self.cut = False  # from the first cut on, the first token of `rest` is the last one of the newest sample
        dtype = token_dtype(tokenizer.vocab_size)
        self.rest = np.empty(0, dtype)
        self.held: np.ndarray | None = None
        self.writer = mds.open_writer(str(folder), dtype, seq_len + 1, compression, shard_bytes)

    def add(self, encoded: Encoded) -> None:
        """Take the next documents."""
        self.documents += encoded.documents
        self.text_bytes += encoded.text_bytes
        self.rest = np.concatenate([self.rest, encoded.tokens])
        whole = max(len(self.rest) - 1, 0) // self.seq_len
        for i in range(whole):
            self.hold(self.rest[i * self.seq_len : (i + 1) * self.seq_len + 1])
        self.rest = self.rest[whole * self.seq_len :]
        self.cut = self.cut or whole > 0

    def hold(self, sample_T: np.ndarray) -> None:
        """Write the sample that was held back and hold this one."""
        self.release()
        self.samples += 1
        self.held = sample_T.copy()

    def release(self) -> None:
        """Write the sample that was held back."""
        if self.held is not None:
            self.writer.write({mds.COLUMN: self.held})
            self.held = None

    def give_last(self) -> np.ndarray:
        """Hand out the newest sample instead of writing it."""
        assert self.held is not None, "there is no sample to give"
        sample_T, self.held = self.held, None
        self.samples -= 1
        return sample_T

    def finish(self) -> SplitInfo:
        """Write what is left and the index, and describe the split."""
        self.release()
        return finish_split(
            self.writer,
            self.folder,
            samples=self.samples,
            tokens=self.samples * self.seq_len,
            documents=self.documents,
            text_bytes=self.text_bytes,
            dropped_tokens=len(self.rest) - self.cut,
        )


def _fill_splits(packers: dict[str, Packer]) -> bool:
    """See that every split has a sample, or raise UserError; True if validation's had to come from train."""
    train, validation = packers[TRAIN], packers.get(VALIDATION)
    moved = validation is not None and not validation.samples and train.samples > 1
    if validation is not None and moved:
        validation.hold(train.give_last())
    if not all(packer.samples for packer in packers.values()):
        counts = " and ".join(f"{packer.samples} of {name}" for name, packer in packers.items())
        raise UserError(
            f"{sum(packer.text_bytes for packer in packers.values()):,} bytes of text give {counts} samples of seq_len "
            f"+ 1 = {train.seq_len + 1} tokens, and each split needs one: give more text or a smaller seq_len"
        )
    return moved


class Progress:
    """Progress bar in bytes of input, or in documents where their size is unknown, with rates of tokens and documents.

    Where stderr is no terminal, a line every LOG_SECONDS and none for runs shorter than that.
    """

    def __init__(self, documents: Iterable[str]):
        self.source = documents if isinstance(documents, Documents) and documents.total_bytes else None
        self.tokens = self.documents = 0
        quiet = not sys.stderr.isatty()
        self.bar: Any = tqdm(
            desc="tokenising",
            total=self.source.total_bytes if self.source else None,
            unit="B" if self.source else " documents",
            unit_scale=True,
            mininterval=LOG_SECONDS if quiet else 0.2,
            delay=LOG_SECONDS if quiet else 0,
            leave=not quiet,
        )
        self.start = time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def add(self, encoded: Encoded) -> None:
        """Count a batch that is written."""
        self.tokens += encoded.tokens.size
        self.documents += encoded.documents
        seconds = max(time.perf_counter() - self.start, 1e-9)
        documents = f", {self.documents / seconds:,.0f} documents/s" if self.source else ""  # else the bar's own rate
        self.bar.set_postfix_str(f"{self.tokens / seconds:,.0f} tokens/s{documents}", refresh=False)
        self.bar.update(self.source.done_bytes - self.bar.n if self.source else encoded.documents)
