import json

import numpy as np
import pytest
import tokenizers

from mosaic_dist.data.tokenizer import Tokenizer, train_bpe
from mosaic_dist.errors import UserError
from tests.data.conftest import make_documents


def test_any_text_survives(tokenizer):
    every_byte_of_utf8 = "".join(map(chr, [*range(0x250), 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]))
    for text in [*make_documents(50, seed=1), every_byte_of_utf8, "", " ", "\n\n\t"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]


def test_special_ids_come_first_and_never_from_text(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 300)
    ids = tokenizer.encode("<|pad|><|bos|><|eos|>")
    assert min(ids) > 2
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "<|pad|><|bos|><|eos|>"
    assert tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False) == "<|eos|>"


def test_training_and_saving_are_deterministic(tokenizer, documents, tmp_path):
    assert train_bpe(documents, 300).digest == tokenizer.digest
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.digest == tokenizer.digest == Tokenizer.load(tmp_path / "tokenizer.json").digest
    assert again.encode(documents[0]) == tokenizer.encode(documents[0])


def test_padding(tokenizer):
    padded = tokenizer.pad_batch([[5, 6], [7]], length=3)
    assert padded.dtype == np.int64
    assert padded.tolist() == [[5, 6, 0], [7, 0, 0]]
    with pytest.raises(ValueError, match="2 tokens does not fit into length 1"):
        tokenizer.pad_batch([[5, 6]], length=1)


def test_too_little_text_names_both_numbers():
    with pytest.raises(UserError, match=r"gave 2\d\d tokens, vocab_size asks for 5000"):
        train_bpe(["too little"], 5000)
    with pytest.raises(UserError, match=r"vocab_size \(100\) must be at least 259"):
        train_bpe(["text"], 100)
    with pytest.raises(UserError, match=r"vocab_size \(2000000\) must be at most 1048576"):
        train_bpe(["text"], 2_000_000)


def test_max_bytes_reads_a_prefix(documents):
    prefix = documents[:40]
    assert train_bpe(documents, 270, max_bytes=sum(len(text.encode()) for text in prefix)).digest == (
        train_bpe(prefix, 270).digest
    )


def foreign(path, specials: list[str]) -> str:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    inner.add_special_tokens(specials)
    inner.enable_truncation(1)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(path))
    return str(path)


def test_foreign_tokenizers(tmp_path):
    found = Tokenizer.load(foreign(tmp_path / "a.json", ["<s>", "</s>", "<pad>"]))
    assert (found.bos_id, found.eos_id, found.pad_id, found.vocab_size) == (2, 3, 4, 5)
    assert found.encode("a a a") == [1, 1, 1]  # the file's own truncation to 1 is off
    with pytest.raises(UserError, match=r"has no end-of-document token: none of <\|eos\|>"):
        Tokenizer.load(foreign(tmp_path / "b.json", ["<s>"]))


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
