"""SentencePiece's `.model` files (Kudo and Richardson, arXiv 1808.06226) as tokenizers of the `tokenizers` package.

Ids and decoded text are those of the `sentencepiece` library, and a model that cannot be had so is refused, but for:

* Unigram adds scores in 64 bits, the library in 32: of two segmentations whose scores are equal up to rounding, each
  may choose another. "aaa" as "a", "aa" or as "aa", "a" is such a pair.
* BPE: two ways to make the same piece that overlap in the text are taken in the order of their parts' lengths, by the
  library from left to right.
* Rules that compose characters (`nfkc`, `nmt_nfkc`, `..._cf`) compose all that Unicode's NFC does; the library leaves
  apart a mark behind a letter that has one already, or not in canonical order, and U+0344.
* A text of nothing but characters that such rules remove has no token; the library may find white space in it.
* Bytes that are no UTF-8, which only a model makes, and the characters U+FDD0 to U+FDEF, which are no text.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from mosaic_dist.errors import UserError

SUFFIX = ".model"
FILE_NAME = f"tokenizer{SUFFIX}"
SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces
UNIGRAM, BPE = 1, 2  # kinds of models
COMPOSING_RULES = ("nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
APART, MARK, UNTOLD, *STAND_INS = map(chr, range(0xFDD0, 0xFDF0))  # Unicode promises that these are no characters


def convert(file: Path, bos: str, eos: str, pad: str) -> str:
    """The tokenizer.json of a SentencePiece model, with its BOS, EOS and PAD, where it has them, under these names.

    Raises UserError where the file is none, the library is missing, or the model is one that cannot be had exactly.
    """
    proto, processor = _read(file)
    try:
        _check(proto)
        inner = _build(proto)
    except _Unsupported as error:
        raise UserError(f"{file} cannot be used: {error}") from None
    ids = {bos: processor.bos_id(), eos: processor.eos_id(), pad: processor.pad_id()}
    known = [(name, token) for name, token in ids.items() if token >= 0]
    inner.post_processor = processors.TemplateProcessing(single="$A", special_tokens=known)
    return inner.to_str()


class _Unsupported(Exception):
    """What a model asks for and is not to be had."""


def _read(file: Path) -> tuple[Any, Any]:
    """The file's content and the library's processor for it."""
    try:
        import sentencepiece
        import sentencepiece.sentencepiece_model_pb2 as messages
    except ImportError as error:
        raise UserError(
            f"{file} needs the packages sentencepiece and protobuf ({error}): pip install 'mosaic-dist[sentencepiece]'"
        ) from None
    content = file.read_bytes()
    try:
        proto = messages.ModelProto.FromString(content)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        whole = proto.IsInitialized() and proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")
    except Exception:  # protobuf and the library each have their own, and RuntimeError
        whole = False
    if not whole or not proto.pieces:
        raise UserError(f"{file} is no SentencePiece model, or is damaged")
    return proto, processor


def _check(proto: Any) -> None:
    """Refuse what `tokenizers` has no means for."""
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    texts = [piece.piece for piece in proto.pieces]
    problems = {
        "it is a model of words or characters; Unigram and BPE are known": trainer.model_type not in (UNIGRAM, BPE),
        "it puts white space behind words (treat_whitespace_as_suffix)": trainer.treat_whitespace_as_suffix,
        "it does not escape white space (escape_whitespaces)": not rules.escape_whitespaces,
        "it has rules of its own for normalisation": rules.precompiled_charsmap and rules.name not in COMPOSING_RULES,
        "it has rules for denormalisation": proto.denormalizer_spec.precompiled_charsmap,
        "it has unused pieces": UNUSED in kinds,
        "it has pieces with a space": any(" " in text for text in texts),
        f"it has pieces with {APART!a} to {STAND_INS[-1]!a}": set("".join(texts)) & {APART, MARK, UNTOLD, *STAND_INS},
        "it lacks some of the 256 bytes": trainer.byte_fallback and sum(p.type == BYTE for p in proto.pieces) != 256,
    }
    for problem, found in problems.items():
        if found:
            raise _Unsupported(problem)
    single = {text for text, piece in zip(texts, proto.pieces, strict=True) if len(text) == 1 and piece.type == NORMAL}
    normal = (piece.piece for piece in proto.pieces if piece.type == NORMAL)
    for text in normal:
        if not set(text) <= single:
            raise _Unsupported(f"its piece {text!r} has a character that is no piece")


def _build(proto: Any) -> Any:
    stand_ins = _stand_ins(proto)
    names = _names(proto, stand_ins)
    unigram = proto.trainer_spec.model_type == UNIGRAM
    inner: Any = tokenizers.Tokenizer(_unigram(proto, names) if unigram else _bpe(proto, names))
    inner.normalizer = _normalizer(proto, stand_ins)
    if all(SPACE not in text.lstrip(SPACE) for text in _written(proto)) and SPACE in names:
        # No piece goes across the beginning of a word, so words can be looked at, and remembered, one by one.
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}+"), "merged_with_next")
    inner.decoder = _decoder(proto, stand_ins)
    kinds = [(name, piece.type) for name, piece in zip(names, proto.pieces, strict=True)]
    inner.add_special_tokens([AddedToken(name, normalized=False) for name, kind in kinds if kind == CONTROL])
    if not unigram:
        inner.add_tokens([AddedToken(name, normalized=True) for name, kind in kinds if kind == USER_DEFINED])
    return inner


def _written(proto: Any) -> list[str]:
    """The pieces that text can be made of."""
    return [piece.piece for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)]


def _stand_ins(proto: Any) -> dict[str, str]:
    """Characters that are written otherwise in text and pieces, so that no text spells "</s>", "<unk>" or "<0x0A>".

    `tokenizers` looks all pieces up in the text, those too that the library never finds there: in Unigram every one, in
    BPE those of one character.
    """
    hidden = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL, BYTE)]
    if proto.trainer_spec.model_type == BPE:
        hidden = [text for text in hidden if len(text) == 1]
    known = set(_written(proto))
    chosen: dict[str, str] = {}
    for text in hidden:
        if any(character in chosen for character in text):
            continue
        character = next((character for character in text if character in known), text[0])
        if (proto.trainer_spec.byte_fallback and character not in known) or len(chosen) == len(STAND_INS):
            raise _Unsupported(f"{text!r} in a text could not be told from the piece")
        chosen[character] = STAND_INS[len(chosen)]
    return chosen


def _names(proto: Any, stand_ins: dict[str, str]) -> list[str]:
    """The pieces as the tokenizer.json has them.

    In BPE a user's symbol is cut out of the text before anything is merged. `tokenizers` does so with an added token,
    which it normalises first: marks at both ends keep the normaliser from changing it.
    """
    table = str.maketrans(stand_ins)
    marked = proto.trainer_spec.model_type == BPE
    names = []
    for piece in proto.pieces:
        name = piece.piece.translate(table) if piece.type in (NORMAL, USER_DEFINED) else piece.piece
        names.append(f"{MARK}{name}{MARK}" if marked and piece.type == USER_DEFINED else name)
    return names


def _unigram(proto: Any, names: list[str]) -> Any:
    # `tokenizers` scores an unknown character by the lowest score of all, the library by that of the normal pieces.
    # Each character of a piece is one itself, so an unknown one is in no other path, and its score moves nothing.
    for text in (piece.piece for piece in proto.pieces if piece.type == USER_DEFINED):
        if any(text.endswith(text[:n]) for n in range(1, len(text))):
            raise _Unsupported(f"its symbol {text!r} overlaps itself, so rounding decides where it is found")
    # A user's symbol costs next to nothing; its length counts only where there are scores above 0.
    best = max(0.0, *(piece.score for piece in proto.pieces if piece.type == NORMAL))
    scores = [
        len(piece.piece.encode()) * best - 0.1 if piece.type == USER_DEFINED else piece.score for piece in proto.pieces
    ]
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    vocabulary = list(zip(names, scores, strict=True))
    return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto: Any, names: list[str]) -> Any:
    """The library merges any two neighbours that make a piece, the one of the highest score first."""
    ids = {name: i for i, name in enumerate(names)}
    made = [(piece.score, name) for piece, name in zip(proto.pieces, names, strict=True) if piece.type == NORMAL]
    parts = {name for _, name in made}
    longer = sorted((-score, name) for score, name in made if len(name) > 1)
    for (score, name), (next_score, other) in itertools.pairwise(longer):
        if score == next_score:
            raise _Unsupported(f"its pieces {name!r} and {other!r} have the same score")
    merges = [
        (name[:cut], name[cut:])
        for _, name in longer
        for cut in range(1, len(name))
        if name[:cut] in parts and name[cut:] in parts
    ]
    unknown = next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN)
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback)


def _composing(proto: Any) -> list[Any]:
    """The model's rules for characters, some of which are for several at once: a letter and its accents."""
    charsmap = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    for text in symbols:
        if charsmap.normalize_str(text.replace(SPACE, "")) != text.replace(SPACE, ""):
            raise _Unsupported(f"its normalisation changes its symbol {text!r}")
    behind = [normalizers.Replace(Regex(f"(?<={'|'.join(map(re.escape, symbols))})(?=\\p{{M}})"), APART)]
    return [
        *(behind if symbols else []),
        normalizers.NFC(),
        # Precompiled applies one rule to a grapheme and drops what is left of it. So each character is made a grapheme
        # of its own, and the rules for several are left to NFC: here, and for the voice marks of halfwidth kana, which
        # only the rules make marks, behind it. At the very start of a text Precompiled panics at one put in.
        normalizers.Replace(Regex(r"(?!\A)(?=[^\x00-\x09\x0B-\x7F])"), APART),
        charsmap,
        normalizers.Replace(Regex(f"{APART}(?=[\u3099\u309a])"), ""),
        normalizers.NFC(),
        normalizers.Replace(APART, ""),
    ]


def _normalizer(proto: Any, stand_ins: dict[str, str]) -> Any:
    """Text to what the model looks its pieces up in."""
    rules = proto.normalizer_spec
    steps = _composing(proto) if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    steps += [normalizers.Replace(plain, stand_in) for plain, stand_in in stand_ins.items()]
    if _has_marks(proto):
        prefix = SPACE if rules.add_dummy_prefix else ""
        steps.append(normalizers.Replace(Regex(rf"\A{prefix}{MARK}|{MARK}\z"), ""))
    return normalizers.Sequence(steps)


def _has_marks(proto: Any) -> bool:
    return proto.trainer_spec.model_type == BPE and any(piece.type == USER_DEFINED for piece in proto.pieces)


def _decoder(proto: Any, stand_ins: dict[str, str]) -> Any:
    unknown = next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN)
    rules = proto.normalizer_spec
    steps: list[Any] = [decoders.Replace(old, new) for old, new in ((unknown, UNTOLD), (MARK, ""), (SPACE, " "))]
    steps += [decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 2**31 if rules.remove_extra_whitespaces else 1, 0))
    # The text of an unknown piece has spaces around it that are not stripped.
    plain = {UNTOLD: proto.trainer_spec.unk_surface} | {new: old for old, new in stand_ins.items()}
    steps += [decoders.Replace(new, old) for new, old in plain.items()]
    return decoders.Sequence(steps)
