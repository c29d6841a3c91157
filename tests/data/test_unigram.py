import os
import subprocess
import sys
from collections import Counter

import pytest
from tokenizers import pre_tokenizers

from mosaic_dist.data.held_out import count_tokens
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.data.unigram import count_words, train_unigram
from mosaic_dist.errors import UserError
from tests.data.conftest import make_documents

pytest.importorskip("sentencepiece")

ODD = [
    "", " ", "  ", "\n\n\t", "  leading", "trailing  ", "a\r\n\tb", "\x00", "x\x00\x07y", "🙂👨‍👩‍👧", "naïve é e\u0301",
    "日本語 テキスト", "x▁y ▁", "<|pad|><|bos|><|eos|>", "<unk></s>", "\u2028\x85\xa0 x", "\ufeffa",
    "a" * 5000, " " * 5000, "".join(map(chr, [*range(0x250), 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF])),
]  # fmt: skip
TRAIN = """
from mosaic_dist.data.unigram import train_unigram
from tests.data.conftest import make_documents
print(train_unigram(make_documents(300), 350).digest)
"""


@pytest.fixture(scope="module")
def unigram(documents) -> Tokenizer:
    return train_unigram(documents, 350)


def test_any_text_survives(unigram):
    for text in [*ODD, *make_documents(50, seed=1), "\n".join(ODD)]:
        ids = unigram.encode(text)
        assert unigram.decode(ids) == text
        assert min(ids, default=3) > 2  # no text has a special token
        assert unigram.encode_batch([text]) == [ids]
    again = Tokenizer(unigram.to_json())
    assert (again.digest, again.encode(ODD[-1])) == (unigram.digest, unigram.encode(ODD[-1]))


def test_the_vocabulary_is_of_the_size_asked_for(unigram, documents):
    assert (unigram.pad_id, unigram.bos_id, unigram.eos_id, unigram.vocab_size) == (0, 1, 2, 350)
    names = [piece for piece, _ in unigram.document["model"]["vocab"]]
    assert len(set(names)) == 350
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(names)
    assert train_unigram(documents, 259).vocab_size == 259
    text_bytes = sum(len(text.encode()) for text in documents)
    assert text_bytes > 3 * count_tokens(unigram, documents)  # as BPE does; a byte a token is nothing


def test_the_tokens_are_the_likeliest_ones(unigram):
    """Against all ways to cut a word into pieces."""
    scores = dict(unigram.document["model"]["vocab"])

    def best(word: str) -> float:
        if not word:
            return 0.0
        return max(scores[word[:i]] + best(word[i:]) for i in range(1, len(word) + 1) if word[:i] in scores)

    pieces = list(scores)
    for word in ("alpha", "beta", "return", "alphabet", "ternary"):
        found = sum(scores[pieces[token]] for token in unigram.encode(word))
        assert found == pytest.approx(best(word), abs=1e-9)


def test_processes_agree():
    found = {
        subprocess.run(
            [sys.executable, "-c", TRAIN],
            env=os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, parallel in (("1", "true"), ("2", "false"))
    }
    assert len(found) == 1


def test_words_are_those_of_the_whole_text(documents):
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [*documents, *ODD, "a  b\n  c\t d\u3000e . f\x1cg\x1c h", "it's\u2003x  'll\n\n\n  if (x):\n\treturn  1"]
    plain = Counter(word for text in texts for word, _ in cut.pre_tokenize_str(text))
    assert count_words(texts, cut) == plain


def test_too_little_text_names_the_limit():
    text = ["one two three four five six seven eight nine ten " * 9]
    with pytest.raises(UserError, match=r"gave (\d+) tokens, vocab_size asks for 5000") as error:
        train_unigram(text, 5000)
    most = int(str(error.value).partition(" tokens")[0].split()[-1])
    assert train_unigram(text, most).vocab_size == most
    with pytest.raises(UserError, match=f"gave {most} tokens"):
        train_unigram(text, most + 1)
    with pytest.raises(UserError, match=r"vocab_size \(258\) must be at least 259"):
        train_unigram(text, 258)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install 'mosaic-dist\[sentencepiece\]'"):
        train_unigram(["text"], 300)


def test_transformers_reads_it(unigram, tmp_path):
    transformers = pytest.importorskip("transformers")
    unigram.save(tmp_path)
    twin = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "alpha beta\n\treturn 日本語 🙂"
    assert twin(text)["input_ids"] == unigram.encode(text)
