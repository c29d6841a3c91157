"""Synthetic arithmetic as a dataset: JSONL for reading and evaluating, and the same rows as MDS for training."""

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mosaic_dist.data import mds
from mosaic_dist.data.answer import AnswerLoss
from mosaic_dist.data.characters import character_tokenizer
from mosaic_dist.data.dataset import DatasetInfo, SplitInfo
from mosaic_dist.data.encode import TRAIN, VALIDATION, token_dtype
from mosaic_dist.data.expressions import EQUALS, OPERATORS, Expressions, Row, draw_rows
from mosaic_dist.data.publish import SHARD_BYTES, finish_split, new_dataset, write_description
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError

CHARACTERS = "0123456789" + OPERATORS + EQUALS  # ids 3 to 17
TEST = "test"


def split_sizes(
    samples: int, train_fraction: float | None, validation_fraction: float, test_fraction: float
) -> dict[str, int]:
    """Samples per split; a fraction of 0 leaves validation or test out, None makes train what the others leave."""
    train_fraction = 1 - validation_fraction - test_fraction if train_fraction is None else train_fraction
    fractions = {TRAIN: train_fraction, VALIDATION: validation_fraction, TEST: test_fraction}
    listed = ", ".join(f"{name} {fraction:g}" for name, fraction in fractions.items())
    if min(fractions.values()) < 0 or train_fraction <= 0 or not math.isclose(sum(fractions.values()), 1.0):
        raise UserError(f"the fractions of the splits ({listed}) must sum to 1, and train be more than 0")
    sizes = {name: round(samples * fraction) for name, fraction in fractions.items() if fraction > 0}
    sizes[TRAIN] = samples - sum(size for name, size in sizes.items() if name != TRAIN)
    if min(sizes.values()) < 1:
        raise UserError(f"{samples} samples are too few for a row in every split ({listed})")
    return sizes


def arithmetic_tokenizer() -> Tokenizer:
    """The 18 tokens: pad, bos, eos, the digits, + - * / and =, with ids 0 to 17 in this order."""
    return character_tokenizer(CHARACTERS)


def prepare_arithmetic(
    expressions: Expressions,
    output: str | Path,
    samples: int,
    *,
    seed: int = 0,
    seq_len: int = 64,
    train_fraction: float | None = None,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    overwrite: bool = False,
) -> DatasetInfo:
    """Draw expressions and publish them at `output`, each in one split: `<split>.jsonl`, and the same rows as MDS.

    A JSONL row has `prompt`, `target` and `text`; the MDS sample of the same number is BOS, text, EOS, and padding up
    to seq_len + 1 tokens. The dataset has an `AnswerLoss`. The bytes written depend on the arguments alone. Raises
    UserError for what does not go together, before anything is written.
    """
    output = Path(output).expanduser()
    sizes = split_sizes(samples, train_fraction, validation_fraction, test_fraction)
    tokenizer = arithmetic_tokenizer()
    with new_dataset(output, overwrite) as aside:
        rows = draw_rows(expressions, samples, seed)
        longest = max((row.text for row in rows), key=len)
        if len(longest) + 1 > seq_len:
            raise UserError(f"seq_len ({seq_len}) must be at least {len(longest) + 1} for BOS, {longest!r} and EOS")
        ends = itertools.accumulate(sizes.values())
        parts = {name: rows[end - size : end] for (name, size), end in zip(sizes.items(), ends, strict=True)}
        info = DatasetInfo(
            path=aside,
            seq_len=seq_len,
            dtype=token_dtype(tokenizer.vocab_size),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.digest,
            eos_id=tokenizer.eos_id,
            bos_id=tokenizer.bos_id,
            splits={name: _write_split(aside, name, part, tokenizer, seq_len) for name, part in parts.items()},
            options={"task": "arithmetic", "samples": samples, "seed": seed} | asdict(expressions),
            sources=[],
            skipped_files=0,
            empty_documents=0,
            answer_loss=AnswerLoss(
                mark_id=tokenizer.encode(EQUALS)[0], pad_id=tokenizer.pad_id, row_tokens=len(longest) + 2
            ),
        )
        write_description(info, tokenizer)
    return DatasetInfo.load(output)


def _write_split(folder: Path, name: str, rows: list[Row], tokenizer: Tokenizer, seq_len: int) -> SplitInfo:
    """One split's JSONL file and MDS shards."""
    dtype = token_dtype(tokenizer.vocab_size)
    writer = mds.open_writer(str(folder / name), dtype, seq_len + 1, None, SHARD_BYTES)
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for row in tqdm(rows, desc=f"writing {name}", unit=" rows", disable=None):
            file.write(json.dumps({"prompt": row.prompt, "target": row.target, "text": row.text}) + "\n")
            ids = [tokenizer.bos_id, *tokenizer.encode(row.text), tokenizer.eos_id]
            writer.write({mds.COLUMN: tokenizer.pad_batch([ids], seq_len + 1)[0].astype(dtype)})
    return finish_split(
        writer,
        folder / name,
        samples=len(rows),
        tokens=sum(len(row.target) + 1 for row in rows),
        documents=len(rows),
        text_bytes=sum(len(row.text) for row in rows),
    )


def read_rows(path: str | Path, split: str = TEST) -> list[Row]:
    """The rows of a split of a dataset made here, in the order of its samples."""
    file = Path(path).expanduser() / f"{split}.jsonl"
    try:
        found: list[dict[str, Any]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [Row(row["prompt"], row["target"]) for row in found]
    except OSError as error:
        raise UserError(
            f"cannot read {file} ({error.strerror}); make the dataset with `python -m data_prep.arithmetic`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}); make the dataset again") from None
