"""Text to token ids and back: a byte-level vocabulary of our own, a `tokenizer.json`, or a SentencePiece model.

Text that looks like a special token is encoded as plain text, so a document cannot contain an EOS id and EOS is a safe
boundary between documents. Imports no torch: the tokenising workers start in a fraction of a second.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
import xxhash
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from mosaic_dist.data import sentencepiece_model
from mosaic_dist.errors import UserError
from mosaic_dist.files import write_atomic

FILE_NAME = "tokenizer.json"
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"  # ids 0, 1, 2 of a tokenizer trained here
SPECIAL = (PAD, BOS, EOS)
SMALLEST_VOCABULARY = len(SPECIAL) + 256  # and every byte
LARGEST_VOCABULARY = 1 << 20  # four times that of any known model; its embedding alone has a thousand million weights

# Names under which foreign tokenizers keep the same three, the likelier first.
PAD_NAMES = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>", "<|endofpad|>")
BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|begin▁of▁sentence|>")
EOS_NAMES = (EOS, "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|end▁of▁sentence|>")


class Tokenizer:
    """Encodes and decodes with one `tokenizer.json`; `vocab_size` is the number of rows that an embedding needs.

    `eos_id` always exists; `bos_id` and `pad_id` fall back to it in foreign tokenizers that have none. `digest` is the
    xxh3-128 of the file's canonical JSON: equal digests mean equal token ids.
    """

    def __init__(self, content: str, origin: str = FILE_NAME):
        """`content` is the text of a tokenizer.json, `origin` its name in errors."""
        try:
            self.document: dict[str, Any] = json.loads(content)
            self._inner = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"{origin} is not a tokenizer.json of the tokenizers package: {error}") from None
        self._inner.no_truncation()  # a foreign file may ask for both; either would change documents in silence
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        vocabulary: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        ids = vocabulary | _named(self.document)
        eos_id = _first_known(ids, EOS_NAMES)
        if eos_id is None:
            raise UserError(f"{origin} has no end-of-document token; one of {', '.join(EOS_NAMES)} is needed")
        self.eos_id: int = eos_id
        self.bos_id: int = _known_or(ids, BOS_NAMES, eos_id)
        self.pad_id: int = _known_or(ids, PAD_NAMES, eos_id)
        self.vocab_size: int = max(vocabulary.values()) + 1  # foreign vocabularies may have gaps

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a JSON file or a SentencePiece `.model`; in a folder, `tokenizer.json` or else `tokenizer.model`."""
        path = Path(path).expanduser()
        file = path / FILE_NAME if path.is_dir() else path
        if not file.exists() and (path / sentencepiece_model.FILE_NAME).is_file():
            file = path / sentencepiece_model.FILE_NAME
        if not file.is_file():
            raise UserError(f"no tokenizer at {file}; make one with `python -m data_prep.train_tokenizer`")
        if file.suffix == sentencepiece_model.SUFFIX:
            return cls(sentencepiece_model.convert(file, bos=BOS, eos=EOS, pad=PAD), str(file))
        try:
            return cls(file.read_text(encoding="utf-8"), str(file))
        except UnicodeDecodeError:
            raise UserError(f"{file} is not UTF-8 text and so no tokenizer.json") from None

    def save(self, path: str | Path) -> None:
        """Write the JSON file, whole or not at all; into a folder, it is named tokenizer.json."""
        path = Path(path).expanduser()
        file = path / FILE_NAME if path.is_dir() else path
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, self.to_json())

    def to_json(self) -> str:
        """The tokenizer.json, indented for readers."""
        return json.dumps(self.document, ensure_ascii=False, indent=1) + "\n"

    @property
    def digest(self) -> str:
        """xxh3-128 of the canonical JSON (sorted keys, no spaces), in hexadecimal."""
        canonical = json.dumps(self.document, sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(canonical.encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with nothing added before or after. UserError for what has no token."""
        with self._telling([text]):
            return self._inner.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that a model is to continue: with the BOS in front where the tokenizer.json asks for one.

        What it puts behind a text (an EOS, say) is left out.
        """
        ids = self.encode(text)
        with_bos = [self.bos_id, *ids]
        whole = self._inner.encode(text, add_special_tokens=True).ids
        return with_bos if whole[: len(with_bos)] == with_bos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, on all cores unless TOKENIZERS_PARALLELISM is off."""
        with self._telling(texts):
            return [found.ids for found in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    @contextlib.contextmanager
    def _telling(self, texts: Sequence[str]) -> Iterator[None]:
        """Name the characters for which a vocabulary without an unknown token has nothing."""
        try:
            yield
        except Exception as error:
            if type(error) is not Exception:  # the Rust side raises bare Exception where the vocabulary has a gap
                raise
            text = next(text for text in texts if not self._takes(text))
            characters = ", ".join(repr(character) for character in dict.fromkeys(text) if not self._takes(character))
            raise UserError(
                f"cannot encode {text[:80]!r}: the tokenizer has no token for {characters or 'it'}"
            ) from None

    def _takes(self, text: str) -> bool:
        try:
            self._inner.encode(text, add_special_tokens=False)
        except Exception:
            return False
        return True

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; `decode(encode(text)) == text` for a byte-level tokenizer."""
        return self._inner.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def decode_batch(self, batch: Iterable[Iterable[int]], skip_special_tokens: bool = True) -> list[str]:
        """Texts of several lists of token ids."""
        plain = [[int(token) for token in ids] for ids in batch]
        return self._inner.decode_batch(plain, skip_special_tokens=skip_special_tokens)

    def pad_batch(self, batch: Sequence[Sequence[int]], length: int | None = None) -> np.ndarray:
        """int64 [B, T] of ragged lists, filled up at the right with `pad_id`; T is `length` or that of the longest."""
        longest = max((len(ids) for ids in batch), default=0)
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"a list of {longest} tokens does not fit into length {length}")
        padded_BT = np.full((len(batch), length), self.pad_id, np.int64)
        for row_T, ids in zip(padded_BT, batch, strict=True):
            row_T[: len(ids)] = ids
        return padded_BT


def _named(document: dict[str, Any]) -> dict[str, int]:
    """Ids that a tokenizer.json gives under our names, whatever its vocabulary calls them (see sentencepiece_model)."""
    tokens = (document.get("post_processor") or {}).get("special_tokens") or {}
    return {name: tokens[name]["ids"][0] for name in (PAD, BOS, EOS) if name in tokens}


def _first_known(ids: dict[str, int], names: Sequence[str]) -> int | None:
    return next((ids[name] for name in names if name in ids), None)


def _known_or(ids: dict[str, int], names: Sequence[str], otherwise: int) -> int:
    found = _first_known(ids, names)
    return otherwise if found is None else found


def train_bpe(texts: Iterable[str], vocab_size: int, min_frequency: int = 2, max_bytes: int | None = None) -> Tokenizer:
    """Learn a byte-level BPE (as in GPT-2: Radford et al. 2019) with PAD, BOS and EOS as ids 0, 1, 2; deterministic.

    Reads at most `max_bytes` of text: one to ten GB are plenty, and the word counts are held in memory. Raises
    UserError where the text is too small for the vocabulary.
    """
    check_vocab_size(vocab_size)
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    counted = Counted(texts, max_bytes)
    inner.train_from_iterator(counted, trainer)
    found = inner.get_vocab_size(with_added_tokens=True)
    if found < vocab_size:
        raise too_little(counted.bytes, found, vocab_size)
    return Tokenizer(inner.to_str(), "the trained tokenizer")


def check_vocab_size(vocab_size: int) -> None:
    """UserError for a size that no tokenizer trained here can have."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size ({vocab_size}) must be at least {SMALLEST_VOCABULARY}: 3 special tokens, 256 bytes"
        )
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"vocab_size ({vocab_size}) must be at most {LARGEST_VOCABULARY}; 32768 to 262144 are usual")


def too_little(text_bytes: int, found: int, vocab_size: int) -> UserError:
    """The error of a text that gives no more than `found` tokens."""
    return UserError(
        f"{text_bytes:,} bytes of text gave {found} tokens, vocab_size asks for {vocab_size}: "
        f"give more text or a vocab_size of {found} or less"
    )


class Counted:
    """The texts with a progress bar, up to a number of bytes; `bytes` of them were read."""

    def __init__(self, texts: Iterable[str], max_bytes: int | None):
        self.texts, self.max_bytes, self.bytes = texts, max_bytes, 0

    def __iter__(self) -> Iterator[str]:
        with tqdm(unit="B", unit_scale=True, desc="reading", total=self.max_bytes, disable=None) as bar:
            for text in self.texts:
                size = len(text.encode())
                if self.max_bytes is not None and self.bytes + size > self.max_bytes and self.bytes:
                    return
                self.bytes += size
                bar.update(size)
                yield text


def no_threads() -> None:
    """Keep `tokenizers` to one thread in this process; for workers, where each has a core of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
