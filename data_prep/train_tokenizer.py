"""`python -m data_prep.train_tokenizer`: learn a byte-level vocabulary from text, and measure it on other text."""

import sys
from pathlib import Path
from typing import Literal

from mosaic_dist.cli import run_command
from mosaic_dist.data.held_out import HeldOut, comparison
from mosaic_dist.data.sources import choose_documents
from mosaic_dist.data.tokenizer import FILE_NAME, Tokenizer, train_bpe
from mosaic_dist.data.unigram import train_unigram
from mosaic_dist.errors import UserError
from mosaic_dist.spec import Positive, UnitInterval


def train_tokenizer(
    *more: str,
    vocab_size: Positive,
    kind: Literal["bpe", "unigram"] = "bpe",
    input: str | None = None,
    dataset: str | None = None,
    split: str = "train",
    field: str = "text",
    output: str = FILE_NAME,
    min_frequency: Positive | None = None,
    max_bytes: Positive | None = None,
    held_out: UnitInterval = 0.005,
    compare: str | None = None,
    overwrite: bool = False,
) -> None:
    """Learn a byte-level BPE or Unigram tokenizer from text and write it as a tokenizer.json.

    python -m data_prep.train_tokenizer --input DIR --vocab_size 8192 --output tokenizer.json

    --kind bpe merges the most frequent pairs; unigram takes the pieces that make the text likeliest, and needs the
    package sentencepiece. Both have pad, bos and eos as ids 0, 1, 2 and every byte, so any text survives.

    --input takes files, folders and globs, comma-separated or as further words: .jsonl, .jsonl.gz, .jsonl.zst and
    .parquet hold a document per row in --field, any other file is one document. `--input stdlib` reads the sources of
    the running Python's standard library (without site-packages, idlelib and tests). --dataset streams a Hugging Face
    dataset instead, as NAME or NAME:CONFIG, or from a local folder; --split says which part.

    --held_out of the documents are not learnt from, and bytes per token are measured on them: the same documents that
    tokenize_to_mds puts into validation with that fraction. --compare measures other tokenizers on them as well: files
    or folders, comma-separated.

    The result depends on the text alone. All words of the text are counted in memory: for more than some GB of text,
    --max_bytes reads only the first so many bytes. --min_frequency (default 2) of a pair that BPE merges.
    """
    target = Path(output).expanduser()
    if target.is_file() and not overwrite:
        raise UserError(f"{target} exists already; choose another --output, or give --overwrite")
    if kind == "unigram" and min_frequency is not None:
        raise UserError(f"--min_frequency {min_frequency} is for --kind bpe; leave it out")
    names = compare.split(",") if compare else []
    others = [(name, Tokenizer.load(name)) for name in names]
    texts = HeldOut(choose_documents(input, more, dataset, split, field), held_out)
    if kind == "bpe":
        tokenizer = train_bpe(texts, vocab_size, min_frequency or 2, max_bytes)
    else:
        tokenizer = train_unigram(texts, vocab_size, max_bytes)
    tokenizer.save(target)
    print(f"{target}: {tokenizer.vocab_size} tokens, digest {tokenizer.digest}", file=sys.stderr)
    print(f"held out: {len(texts.texts):,} of {texts.documents:,} documents, {texts.text_bytes:,} bytes")
    if texts.texts:
        print(comparison([(str(target), tokenizer), *others], texts.texts))
    else:
        print("no bytes per token were measured: give more documents or a larger --held_out")


if __name__ == "__main__":
    run_command(train_tokenizer, "python -m data_prep.train_tokenizer")
