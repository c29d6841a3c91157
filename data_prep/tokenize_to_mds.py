"""`python -m data_prep.tokenize_to_mds`: turn text into a dataset of token samples, ready for training."""

import sys
import time

from mosaic_dist.cli import run_command
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.sources import choose_documents
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.spec import NonNegative, Positive, UnitInterval


def tokenize_to_mds(
    *more: str,
    tokenizer: str,
    output: str,
    seq_len: Positive,
    eos: str | None = None,
    bos: str | None = None,
    add_bos_token: bool = False,
    input: str | None = None,
    dataset: str | None = None,
    split: str = "train",
    field: str = "text",
    min_document_bytes: NonNegative = 0,
    max_document_bytes: Positive | None = None,
    deduplicate: bool = False,
    validation_fraction: UnitInterval = 0.005,
    workers: Positive | None = None,
    compression: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
) -> None:
    """Tokenise text and write a dataset of fixed-length samples as MDS shards.

    python -m data_prep.tokenize_to_mds --input DIR --tokenizer tokenizer.json --output data --seq_len 512

    --input takes files, folders and globs, comma-separated or as further words: .jsonl, .jsonl.gz, .jsonl.zst and
    .parquet hold a document per row in --field, any other file is one document. `--input stdlib` reads the sources of
    the running Python's standard library (without site-packages, idlelib and tests). --dataset streams a Hugging Face
    dataset instead, as NAME or NAME:CONFIG, or from a local folder; --split says which part.

    --tokenizer is a tokenizer.json, a SentencePiece .model, or a folder that holds one (tokenizer.json, else
    tokenizer.model). Documents end with its EOS and are packed without gaps; --add_bos_token begins each with its BOS.
    --eos and --bos name any of its tokens for that, such as --eos '<|endoftext|>' or --eos "'[SEP]'" (brackets need
    both pairs of quotes). By default they are those that tokenizer_config.json in the tokenizer's folder names, or else
    the usual ones among its added tokens.
    --min_document_bytes and --max_document_bytes leave out shorter and longer documents (bytes of UTF-8).
    --deduplicate keeps the first of equal texts, by a hash of 128 bits; it takes about 20 bytes of memory a document.
    --validation_fraction of the documents, chosen by a hash of their text, become the validation split (0: none).
    --workers is the number of processes (default: one per core) and changes nothing in the result. --compression zstd
    (or zstd:1) makes shards smaller on disk until their first use.

    The output appears when it is whole; --overwrite replaces an existing dataset at that moment. Until then the work
    lies in OUTPUT.unfinished. After a kill the same command goes on there, losing half a minute, and ends with the
    same bytes. A command with other options or changed inputs is refused; --restart throws the unfinished work away.
    """
    start = time.perf_counter()
    documents = choose_documents(input, more, dataset, split, field)
    words = Tokenizer.load(tokenizer, eos=eos, bos=bos)
    if words.adds_bos and not add_bos_token:
        print(
            f"{tokenizer} puts {words.tokens['bos_token']!r} before each prompt, but no document will begin with it; "
            "--add_bos_token changes that",
            file=sys.stderr,
        )
    info = prepare(
        documents,
        words,
        output,
        seq_len,
        validation_fraction=validation_fraction,
        min_document_bytes=min_document_bytes,
        max_document_bytes=max_document_bytes,
        deduplicate=deduplicate,
        add_bos_token=add_bos_token,
        workers=workers,
        compression=compression,
        overwrite=overwrite,
        restart=restart,
    )
    seconds = time.perf_counter() - start
    tokens = sum(part.tokens for part in info.splits.values())
    print(f"{info.summary()}\n  {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_command(tokenize_to_mds, "python -m data_prep.tokenize_to_mds")
