"""`python -m data_prep.train_tokenizer`: learn a byte-level BPE vocabulary from text."""

import sys
from pathlib import Path
from typing import Any

from mosaic_dist.cli import run_command
from mosaic_dist.data.sources import choose_documents
from mosaic_dist.data.tokenizer import FILE_NAME, train_bpe
from mosaic_dist.errors import UserError
from mosaic_dist.spec import Positive


def train_tokenizer(
    *more: Any,
    vocab_size: Positive,
    input: str | tuple[str, ...] | None = None,
    dataset: str | None = None,
    split: str = "train",
    field: str = "text",
    output: str = FILE_NAME,
    min_frequency: Positive = 2,
    max_bytes: Positive | None = None,
    overwrite: bool = False,
) -> None:
    """Learn a byte-level BPE tokenizer from text and write it as a tokenizer.json.

    python -m data_prep.train_tokenizer --input DIR --vocab_size 8192 --output tokenizer.json

    --input takes files, folders and globs, comma-separated or as further words: .jsonl, .jsonl.gz, .jsonl.zst and
    .parquet hold a document per row in --field, any other file is one document. `--input stdlib` reads the sources of
    the running Python's standard library (without site-packages, idlelib and tests). --dataset streams a Hugging Face
    dataset instead, as NAME or NAME:CONFIG, or from a local folder; --split says which part.

    The result depends on the text alone. All words of the text are counted in memory: for more than some GB of text,
    --max_bytes reads only the first so many bytes.
    """
    target = Path(output).expanduser()
    if target.is_file() and not overwrite:
        raise UserError(f"{target} exists already; choose another --output, or give --overwrite")
    documents = choose_documents(input, more, dataset, split, field)
    tokenizer = train_bpe(documents, vocab_size, min_frequency, max_bytes)
    tokenizer.save(target)
    print(f"{target}: {tokenizer.vocab_size} tokens, digest {tokenizer.digest}", file=sys.stderr)


if __name__ == "__main__":
    run_command(train_tokenizer, "python -m data_prep.train_tokenizer")
