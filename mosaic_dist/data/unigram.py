"""Unigram vocabularies (Kudo, arXiv 1804.10959) over the same byte-level words as our BPE, so any text survives.

The `sentencepiece` library learns the pieces and their scores; encoding is that of `tokenizers`. The trainer of
`tokenizers` adds up the words in the order of a hash table with a new seed in each process: scores, ids and digest
differ from run to run. The library's result depends on the words, their order and the number of threads alone.
"""

import collections
import io
import re
import tempfile
from collections.abc import Iterable
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mosaic_dist.data.tokenizer import SPECIAL, Counted, Tokenizer, check_vocab_size, too_little
from mosaic_dist.errors import UserError

LONGEST_PIECE = 16  # bytes
MOST_SEEDS = 1_000_000
THREADS = 4  # of the library: part of the result (they share out the words), so not the number of cores
LONGEST_WORD_BYTES = 1 << 30  # the most that the library allows; it leaves out longer ones
UNSEEN_COST = 10.0  # natural logarithm: a byte that the text lacks is so much less likely than the rarest piece

WORD_START = re.compile(r"(?<=[!-~])(?=\s)")
"""Where the byte-level pre-tokenizer always cuts: each of its words holds white space at its start only, or nothing
else. Counting what is between these places first spares it most of the text."""


def train_unigram(texts: Iterable[str], vocab_size: int, max_bytes: int | None = None) -> Tokenizer:
    """Learn a byte-level Unigram tokenizer with PAD, BOS and EOS as ids 0, 1, 2; deterministic.

    Reads at most `max_bytes` of text; the words and their parts are counted in memory. Needs the package sentencepiece.
    Raises UserError where the text is too small for the vocabulary.
    """
    check_vocab_size(vocab_size)
    trainer = _trainer()
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counted = Counted(texts, max_bytes)
    words = count_words(counted, cut)
    unseen = sorted(set(pre_tokenizers.ByteLevel.alphabet()).difference(*words))
    others = len(SPECIAL) + len(unseen)
    pieces, most = _learn(trainer, words, vocab_size - others) if words else ([], 0)
    if most < vocab_size - others:
        raise too_little(counted.bytes, others + most, vocab_size)
    lowest = min((score for _, score in pieces), default=0.0) - UNSEEN_COST
    # No text spells a special token's name: the pre-tokenizer cuts it where its letters begin.
    vocabulary = [(name, 0.0) for name in SPECIAL] + pieces + [(byte, lowest) for byte in unseen]
    inner: Any = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=None))
    inner.pre_tokenizer, inner.decoder = cut, decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    return Tokenizer(inner.to_str(), "the trained tokenizer")


def count_words(texts: Iterable[str], cut: Any) -> collections.Counter[str]:
    """How often each word of a byte-level pre-tokenizer is in the texts."""
    parts: collections.Counter[str] = collections.Counter()
    for text in texts:
        parts.update(WORD_START.split(text))
    words: collections.Counter[str] = collections.Counter()
    for part, times in parts.items():
        for word, _ in cut.pre_tokenize_str(part):
            words[word] += times
    return words


def _trainer() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            f"Unigram needs the package sentencepiece ({error}): pip install 'mosaic-dist[sentencepiece]', or take BPE"
        ) from None
    return sentencepiece


def _learn(library: Any, words: collections.Counter[str], pieces: int) -> tuple[list[tuple[str, float]], int]:
    """So many pieces with their scores, the likeliest first, among them each single byte that is in a word.

    The second value is how many there can be at most; where that is less than `pieces`, there are none.
    """
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".tsv") as file:
        file.writelines(f"{piece}\t{count}\n" for piece, count in seed_pieces(words))
        file.flush()
        try:
            _train(library, words, pieces, file.name, model)
        except RuntimeError as error:
            limit = re.search(r"value <= (\d+)", str(error))
            if limit is None:
                raise
            return [], int(limit[1]) - 1
    learnt = library.SentencePieceProcessor(model_proto=model.getvalue())
    return [(learnt.id_to_piece(i), learnt.get_score(i)) for i in range(1, pieces + 1)], pieces


def seed_pieces(words: collections.Counter[str]) -> list[tuple[str, int]]:
    """What pieces are chosen from, with their counts: single bytes, then parts of words that cover most of the text.

    The library's own choice, given words instead of sentences, lacks those that are no part of another word.
    """
    found: collections.Counter[str] = collections.Counter()
    for word, times in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + LONGEST_PIECE, len(word)) + 1):
                found[word[start:end]] += times
    seeds = [(piece, count) for piece, count in found.items() if count > 1 or len(piece) == 1]
    return sorted(seeds, key=lambda seed: (len(seed[0]) > 1, -seed[1] * len(seed[0]), seed[0]))[:MOST_SEEDS]


def _train(library: Any, words: collections.Counter[str], pieces: int, seeds: str, model: io.BytesIO) -> None:
    """Let the library learn, from words and a file of pieces to choose from."""
    library.SentencePieceTrainer.train(
        sentence_iterator=(f"{word}\t{times}" for word, times in sorted(words.items())),
        input_format="tsv",
        seed_sentencepieces_file=seeds,
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces + 1,  # and the unknown one, which is left out below
        num_threads=THREADS,
        character_coverage=1.0,
        max_sentence_length=LONGEST_WORD_BYTES,
        # The words are cut and normalised already: they are bytes, written as letters.
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        split_by_number=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
