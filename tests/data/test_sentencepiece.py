"""SentencePiece models against the library that trains and reads them."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError

sentencepiece = pytest.importorskip("sentencepiece")
messages = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")

LINES = [
    line
    for path in sorted(Path(json.__file__).parent.parent.glob("[a-h]*.py"))
    for line in path.read_text(encoding="utf-8").splitlines()
    if line.strip()
]
ODD = [
    "",
    "  ",
    " a",
    "a  b ",
    "\t\tx",
    "e\u0301",
    "\u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8",
    "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u2460\u0308",
    "\xad",
    "\ufeffa",
    "\uff76\uff9e",
    "\uff46\uff55\uff4c\uff4c",
    "a\u200bb",
    "\u2581\u2581x\u2581",
    "<s></s><unk><0x0A>",
    "<sep><cls>a <sep> <ctl>",
    "\xe9\u2603\u2603\xe9\u2603",
    "x\r\ny\n\nz",
    "\u0928\u093f \u0e01\u0e33",
    "selfself",
    "\u01c4 \ufb01 \xbd \uff1csep\uff1e",
    "a\u0323\u0301",
    "\u1100\u1161\u11a8 \uac00",
    "x\x00\x07",
    "self\u0301",
    "x y x\u2581y",
    "\u2581",
]
PARTS = [
    "a",
    "b",
    "e",
    " ",
    "  ",
    "<",
    "s",
    ">",
    "/",
    "0",
    "x",
    "A",
    "\u0301",
    "\xe9",
    "\u65e5",
    "\u672c",
    "\u2603",
    "\n",
    "\t",
    "\u2581",
    "=",
    "self",
    "import",
    "unk",
    "\U0001f642",
    "\u2460",
    "sep",
    "\ufb01",
    "-",
    "#",
    "\x00",
    "\x07",
    "\u200b",
    "\xa0",
    "\r",
]


def texts() -> list[str]:
    """Lines of code, whole files' worth of them, odd texts, and odd characters thrown together."""
    dice = random.Random(0)
    thrown = ["x" + "".join(dice.choices(PARTS, k=dice.randint(1, 25))) for _ in range(2000)]
    return [*ODD, *thrown, *dice.sample(LINES, 2000), "\n".join(LINES[:300])]


VERBATIM = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SYMBOLS = {"user_defined_symbols": ["<sep>", "é☃", "self", "x▁y"], "control_symbols": ["<ctl>", "☃"]}
KINDS = {
    "default": {},
    "bytes": {"byte_fallback": True},
    "verbatim": VERBATIM | {"byte_fallback": True},
    "no prefix": VERBATIM | {"add_dummy_prefix": False},
    "across words": VERBATIM
    | {"byte_fallback": True, "split_by_whitespace": False, "allow_whitespace_only_pieces": True},
    "symbols": SYMBOLS | {"unk_surface": "?"},
    "symbols and bytes": SYMBOLS | {"byte_fallback": True, "control_symbols": ["<ctl>"], "bos_id": -1, "pad_id": 3},
    "folded": {"normalization_rule_name": "nmt_nfkc_cf"},
}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("sentencepiece")
    sample = random.Random(1).sample(LINES, 3000)

    def trained(kind: str, **options: object) -> Path:
        prefix = folder / str(len(list(folder.iterdir())))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_prefix=str(prefix),
            model_type=kind,
            vocab_size=700,
            num_threads=1,
            minloglevel=2,
            **options,
        )
        return prefix.with_suffix(".model")

    return trained


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_and_text_are_those_of_the_library(kind, options, train):
    path = train(kind, **options)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (library.get_piece_size(), library.eos_id())
    assert tokenizer.bos_id == (library.bos_id() if library.bos_id() >= 0 else library.eos_id())
    assert tokenizer.pad_id == (library.pad_id() if library.pad_id() >= 0 else library.eos_id())
    ties, tried = 0, texts()
    for text, ids in zip(tried, tokenizer.encode_batch(tried), strict=True):
        expected = library.encode(text)
        assert tokenizer.decode(ids) == library.decode(expected), text
        if ids != expected:
            # segmentations of equal score, which the library's 32 bits and our 64 tell apart by rounding alone
            scores = [sum(library.get_score(token) for token in found) for found in (ids, expected)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-3), text
            ties += 1
        assert not {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id} & set(ids), text
    assert ties <= (0 if kind == "bpe" else len(tried) // 200)
    again = Tokenizer(tokenizer.to_json())
    assert (again.digest, again.eos_id, again.pad_id) == (tokenizer.digest, tokenizer.eos_id, tokenizer.pad_id)


def test_all_characters_are_normalised_alike(train):
    path = train("bpe", byte_fallback=True)
    library, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path)), Tokenizer.load(path)
    stand_ins = range(0xFDD0, 0xFDF0)
    codes = [code for code in range(0x20000) if not 0xD800 <= code < 0xE000 and code not in stand_ins]
    tried = [f"x{chr(code)}y{chr(code)}" for code in codes]
    found = zip(codes, tried, tokenizer.encode_batch(tried), strict=True)
    wrong = [code for code, text, ids in found if ids != library.encode(text)]
    assert wrong == [0x0344]  # a pair of marks in one, which NFC takes apart, and then composes a letter with the first


def test_folders(train, tmp_path):
    path = train("bpe")
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.digest == Tokenizer.load(path).digest
    Tokenizer.load(train("unigram")).save(tmp_path)
    assert Tokenizer.load(tmp_path).digest != tokenizer.digest  # a tokenizer.json comes first


def test_the_end_has_the_name_that_the_model_gives_it(train):
    path = train("unigram", eos_piece="[SEP]", eos_id=5, user_defined_symbols=["</s>"])
    tokenizer = Tokenizer.load(path)
    assert tokenizer.eos_id == Tokenizer(tokenizer.to_json()).eos_id == 5
    assert 5 not in tokenizer.encode("a [SEP] b")
    with pytest.raises(UserError, match="has no end-of-document token"):
        Tokenizer.load(train("unigram", eos_id=-1))


def test_wrong_files(train, tmp_path):
    whole = train("bpe").read_bytes()
    dice, file = random.Random(0), tmp_path / "x.model"
    cuts = [whole[: dice.randrange(len(whole) - 1)] for _ in range(50)]
    for content in [b"", b"{}", dice.randbytes(1000), *cuts]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.model is no SentencePiece model, or is damaged"):
            Tokenizer.load(file)
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "y.model")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("word", {}, "it is a model of words or characters"),
        ("bpe", {"treat_whitespace_as_suffix": True}, "white space behind words"),
        ("unigram", {"user_defined_symbols": ["▁▁"]}, "its symbol '▁▁' overlaps itself"),
        ("bpe", {"user_defined_symbols": ["①"]}, "its normalisation changes its symbol '①'"),
        ("bpe", {"user_defined_symbols": ["a b"]}, "it has pieces with a space"),
        ("bpe", {"control_symbols": ["☃"], "byte_fallback": True}, "'☃' in a text could not be told from the piece"),
    ],
)
def test_what_cannot_be_had_is_refused(kind, options, message, train):
    with pytest.raises(UserError, match=message):
        Tokenizer.load(train(kind, **options))


def unused(proto) -> None:
    proto.pieces[-1].type = 5


def same_scores(proto) -> None:
    for piece in proto.pieces:
        piece.score = 0


def own_rules(proto) -> None:
    proto.normalizer_spec.name = "user_defined"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unused, "it has unused pieces"),
        (same_scores, "have the same score"),
        (own_rules, "rules of its own for normalisation"),
    ],
)
def test_altered_models_are_refused(change, message, train, tmp_path):
    proto = messages.ModelProto.FromString(train("bpe").read_bytes())
    change(proto)
    (tmp_path / "x.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path / "x.model")


def test_a_missing_library_is_named(train, monkeypatch):
    path = train("bpe")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install 'mosaic-dist\[sentencepiece\]'"):
        Tokenizer.load(path)
