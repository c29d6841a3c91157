"""Recognises vocabularies in tiktoken's form, such as Llama 3's `tokenizer.model`, which are not read here."""

import re
from pathlib import Path

from mosaic_dist.errors import UserError

SUFFIX = ".tiktoken"
LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")  # a token in base64, and its rank
CHECKED_LINES, CHECKED_BYTES = 3, 4096


def refuse_tiktoken(file: Path) -> None:
    """UserError for a tiktoken file.

    Such a file has neither the rule that splits text nor the special tokens; those are in the code of its model.
    """
    with open(file, "rb") as opened:
        lines = opened.read(CHECKED_BYTES).splitlines(keepends=True)[:CHECKED_LINES]
    if lines and all(LINE.fullmatch(line) for line in lines):
        raise UserError(
            f"{file} is a tiktoken vocabulary, which has neither special tokens nor the rule that splits text. Use the "
            "tokenizer.json of the same model in Hugging Face's form (for Llama 3 it is in the same repository), or "
            "make one: transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIR), then --tokenizer DIR"
        )
