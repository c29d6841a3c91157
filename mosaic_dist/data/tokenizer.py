"""Text to token ids and back: a byte-level vocabulary of our own, a `tokenizer.json`, or a SentencePiece model.

Text that looks like a special token is encoded as plain text, so a document cannot contain an EOS id and EOS is a safe
boundary between documents. Imports no torch: the tokenising workers start in a fraction of a second.
"""

import contextlib
import dataclasses
import difflib
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

from mosaic_dist.data import sentencepiece_model, tiktoken_file
from mosaic_dist.data.tokenizer_config import (
    BOS_TOKEN,
    CONFIG_NAME,
    EOS_TOKEN,
    GENERATION_NAME,
    NO_CONFIG,
    PAD_TOKEN,
    TokenizerConfig,
)
from mosaic_dist.errors import UserError
from mosaic_dist.files import write_atomic

FILE_NAME = "tokenizer.json"
FILE_NAMES = (FILE_NAME, sentencepiece_model.FILE_NAME)  # in a folder, the first that is there
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"  # ids 0, 1, 2 of a tokenizer trained here
SPECIAL = (PAD, BOS, EOS)
SMALLEST_VOCABULARY = len(SPECIAL) + 256  # and every byte
LARGEST_VOCABULARY = 1 << 20  # four times that of any known model; its embedding alone has a thousand million weights

# The usual names of the three among added tokens, the likelier first, for folders without a tokenizer_config.json.
# U+FF5C, in DeepSeek's names, is a full-width bar.
PAD_NAMES = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>", "<|endofpad|>", "<\uff5c▁pad▁\uff5c>")
BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<\uff5cbegin▁of▁sentence\uff5c>")
EOS_NAMES = (EOS, "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<\uff5cend▁of▁sentence\uff5c>")


class Tokenizer:
    """Encodes and decodes with one `tokenizer.json`; `vocab_size` is the number of rows that an embedding needs.

    `eos_id` always exists; `bos_id` and `pad_id` fall back to it in foreign tokenizers that have none. Each of
    `stop_ids` ends a generated text; the EOS is the first of them. `digest` is the xxh3-128 of the file's canonical
    JSON: equal digests mean equal token ids.
    """

    def __init__(self, content: str, origin: str = FILE_NAME, config: TokenizerConfig = NO_CONFIG):
        """`content` is the text of a tokenizer.json, `origin` its name in errors, `config` what its folder adds."""
        try:
            self.document: dict[str, Any] = json.loads(content)
            self._inner = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"{origin} is not a tokenizer.json of the tokenizers package: {error}") from None
        self._inner.no_truncation()  # a foreign file may ask for both; either would change documents in silence
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        self.origin, self.config = origin, config
        vocabulary: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1  # foreign vocabularies may have gaps
        eos_id = self._find(EOS_TOKEN, EOS_NAMES)
        if eos_id is None:
            raise UserError(
                f"{origin} has no end-of-document token: none of {', '.join(EOS_NAMES)} is among its added tokens. "
                f"Name one with --eos, or as {EOS_TOKEN} in a {CONFIG_NAME} in the same folder"
            )
        bos_id, pad_id = self._find(BOS_TOKEN, BOS_NAMES), self._find(PAD_TOKEN, PAD_NAMES)
        self.eos_id: int = eos_id
        self.bos_id: int = eos_id if bos_id is None else bos_id
        self.pad_id: int = eos_id if pad_id is None else pad_id
        self.tokens: dict[str, str | None] = {
            BOS_TOKEN: None if bos_id is None else self._inner.id_to_token(bos_id),
            EOS_TOKEN: self._inner.id_to_token(eos_id),
            PAD_TOKEN: self._inner.id_to_token(self.pad_id),
        }
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([eos_id, *config.stop_ids]))
        if max(self.stop_ids) >= self.vocab_size:
            raise UserError(
                f"{origin} has {self.vocab_size} tokens, and eos_token_id in the {GENERATION_NAME} or config.json in "
                f"the same folder is {list(config.stop_ids)}: correct that file"
            )

    @classmethod
    def load(cls, path: str | Path, eos: str | None = None, bos: str | None = None) -> Self:
        """Read a JSON file or a SentencePiece `.model`; in a folder, `tokenizer.json` or else `tokenizer.model`.

        `eos` and `bos` name any token for these roles. Otherwise tokenizer_config.json in the folder of a file of these
        names decides, and without it the usual names are looked for among the added tokens.
        """
        file = _tokenizer_file(Path(path).expanduser())
        config = TokenizerConfig.read(file.parent) if file.name in FILE_NAMES else NO_CONFIG
        chosen = {role: name for role, name in ((EOS_TOKEN, eos), (BOS_TOKEN, bos)) if name is not None}
        found = cls(_read(file), str(file), dataclasses.replace(config, tokens={**config.tokens, **chosen}))
        # transformers goes by the post-processor alone, so that is where the setting belongs.
        return found.adding_bos() if config.add_bos_token and found.bos_id != found.eos_id else found

    def save(self, path: str | Path, max_length: int | None = None, eos_roles: Sequence[str] = ()) -> list[str]:
        """Write the JSON file, whole or not at all.

        Into a folder, it is named tokenizer.json, and the special tokens, further end tokens and chat template go into
        files next to it, whose names are returned: transformers' `AutoTokenizer` loads that folder, and so does `load`.
        For `max_length` and `eos_roles`, see `companions`.
        """
        path = Path(path).expanduser()
        companions = self.companions(max_length, eos_roles) if path.is_dir() else {}
        file = path / FILE_NAME if path.is_dir() else path
        file.parent.mkdir(parents=True, exist_ok=True)
        for name, content in companions.items():
            write_atomic(path / name, content)
        write_atomic(file, self.to_json())
        return list(companions)

    def companions(self, max_length: int | None = None, eos_roles: Sequence[str] = ()) -> dict[str, str]:
        """Names and texts of the files that belong next to tokenizer.json.

        `max_length` is the context of the model, for transformers. The EOS takes those of `eos_roles`, such as
        "bos_token", for which there is no token.
        """
        taken = {role: token for role, token in self.tokens.items() if token is not None}
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # makes `AutoTokenizer` take tokenizer.json as it is
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],  # transformers' default adds token_type_ids
            **self.tokens,
            **{role: self.tokens[EOS_TOKEN] for role in eos_roles if role not in taken},
        }
        if max_length is not None:
            settings["model_max_length"] = max_length
        if self.config.chat_template is not None:
            settings["chat_template"] = self.config.chat_template
        files = {CONFIG_NAME: _indented(settings)}
        if len(self.stop_ids) > 1:
            files[GENERATION_NAME] = _indented(self.special_ids())
        return files

    def special_ids(self) -> dict[str, Any]:
        """Ids of the special tokens in the form of transformers' config.json and generation_config.json.

        A pad that is the EOS too is left out, because transformers gives the pad's embedding no gradient.
        """
        return {
            "bos_token_id": None if self.tokens[BOS_TOKEN] is None else self.bos_id,
            "eos_token_id": self.eos_id if len(self.stop_ids) == 1 else list(self.stop_ids),
            "pad_token_id": None if self.pad_id == self.eos_id else self.pad_id,
        }

    def to_json(self) -> str:
        """The tokenizer.json, indented for readers."""
        return _indented(self.document)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.to_json(), self.origin, self.config)

    @property
    def digest(self) -> str:
        """xxh3-128 of the canonical JSON (sorted keys, no spaces), in hexadecimal."""
        return json_digest(self.document)

    @property
    def adds_bos(self) -> bool:
        """Whether `encode_prompt`, and transformers, put the BOS before a text."""
        return self.encode_prompt("")[:1] == [self.bos_id]

    def adding_bos(self) -> Self:
        """The tokenizer that also puts the BOS before a text; UserError if there is no BOS but the EOS."""
        if self.bos_id == self.eos_id:
            raise UserError(
                f"{self.origin} has no BOS, or the same token {self.tokens[EOS_TOKEN]!r} for BOS and EOS; name another "
                "token with --bos"
            )
        if self.adds_bos:
            return self
        name = self.tokens[BOS_TOKEN]
        bos, first, second = (
            {"SpecialToken": {"id": name, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
        )
        template = {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, bos, second],
            "special_tokens": {name: {"id": name, "ids": [self.bos_id], "tokens": [name]}},
        }
        present = self.document.get("post_processor")
        both = template if present is None else {"type": "Sequence", "processors": [present, template]}
        config = dataclasses.replace(self.config, tokens=self.tokens)
        return type(self)(json.dumps(self.document | {"post_processor": both}), self.origin, config)

    def has_ids_of(self, other: "Tokenizer") -> bool:
        """Whether both encode text to the same ids; special tokens that they add around a text may differ."""
        mine, theirs = (json_digest(one.document | {"post_processor": None}) for one in (self, other))
        return mine == theirs

    def _find(self, role: str, usual_names: Sequence[str]) -> int | None:
        """The token that is named for a role, else the first of the usual names; None for a role without a token."""
        added = {token["content"]: token["id"] for token in self.document.get("added_tokens") or ()}
        if role not in self.config.tokens:
            known = added | _named(self.document)
            return next((known[name] for name in usual_names if name in known), None)
        name = self.config.tokens[role]
        token = None if name is None else self._inner.token_to_id(name)
        if name is not None and token is None:
            near = difflib.get_close_matches(name, added, n=1) or list(added)[:5]
            raise UserError(
                f"{self.origin} has no token {name!r}, which is named as its {role} (by an option, or by {CONFIG_NAME} "
                f"in the same folder); it has {', '.join(map(repr, near)) or 'no added tokens'}"
            )
        return token

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


def _tokenizer_file(path: Path) -> Path:
    """The file that holds the tokenizer, from its own path or its folder's."""
    known = [path / name for name in FILE_NAMES] + sorted(path.glob("*.tiktoken")) if path.is_dir() else [path]
    file = next((file for file in known if file.is_file()), None)
    if file is None:
        raise UserError(f"no tokenizer at {known[0]}; make one with `python -m data_prep.train_tokenizer`")
    return file


def _read(file: Path) -> str:
    """The text of a tokenizer.json, converted if the file has another form."""
    if file.suffix in (sentencepiece_model.SUFFIX, tiktoken_file.SUFFIX):
        tiktoken_file.refuse_tiktoken(file)
    if file.suffix == sentencepiece_model.SUFFIX:
        return sentencepiece_model.convert(file, bos=BOS, eos=EOS, pad=PAD)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text and so no tokenizer.json") from None


def _indented(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def json_digest(document: dict[str, Any]) -> str:
    """xxh3-128 of JSON in its canonical form (sorted keys, no spaces), in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def _named(document: dict[str, Any]) -> dict[str, int]:
    """Ids that a tokenizer.json gives under our names, whatever its vocabulary calls them (see sentencepiece_model)."""
    tokens = (document.get("post_processor") or {}).get("special_tokens") or {}
    return {name: tokens[name]["ids"][0] for name in (PAD, BOS, EOS) if name in tokens}


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
