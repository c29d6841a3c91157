import itertools

import numpy as np
import pytest

from mosaic_dist.data import encode
from mosaic_dist.data.documents import Chosen, Mark
from mosaic_dist.data.encode import batches, encode_batch, pieces
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.sources import read_documents
from tests.data.conftest import SEQ_LEN, make_documents


def choose(texts, sources=None):
    return [Chosen(text, (sources or [0] * len(texts))[i], Mark(documents=i + 1)) for i, text in enumerate(texts)]


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr("mosaic_dist.data.encode.PIECE_CHARACTERS", 500)


def test_batches_are_bounded_and_of_one_input(monkeypatch):
    monkeypatch.setattr("mosaic_dist.data.encode.BATCH_BYTES", 10)
    monkeypatch.setattr("mosaic_dist.data.encode.BATCH_DOCUMENTS", 3)
    texts = ["1234567", "89", "x" * 50, "a", "b", "c", "d", "e"]
    found = list(batches(choose(texts, [0, 0, 0, 0, 0, 0, 0, 1])))
    assert [batch.texts for batch in found] == [["1234567", "89"], ["x" * 50], ["a", "b", "c"], ["d"], ["e"]]
    assert [(batch.source, batch.mark.documents, batch.characters) for batch in found] == [
        (0, 2, 9),
        (0, 3, 50),
        (0, 6, 3),
        (0, 7, 1),
        (1, 8, 1),
    ]
    assert list(batches([])) == []


def test_long_documents_are_cut_at_lines(tokenizer, short_pieces):
    text = "\n".join(line for text in make_documents(100) for line in text.splitlines())
    cut = list(pieces(text))
    assert "".join(cut) == text
    assert len(cut) > 10
    assert 250 < sum(map(len, cut[:-1])) / len(cut[:-1]) <= max(map(len, cut)) <= 500
    ends = {(left[-2].isspace(), left[-1], right[0].isspace()) for left, right in itertools.pairwise(cut)}
    assert ends == {(False, "\n", False)}
    (found,) = encode_batch(tokenizer, [text], 0.0)
    assert found.tokens.tolist() == [*tokenizer.encode(text), tokenizer.eos_id]  # as if there were no pieces
    assert (found.documents, found.text_bytes) == (1, len(text.encode()))


def test_one_line_is_cut_anywhere(tokenizer, short_pieces):
    text = "naïve日本語🙂" * 1000
    assert {len(piece) for piece in pieces(text)} <= {500, len(text) % 500}
    found = encode_batch(tokenizer, ["short", text, "short"], 0.0)[0]
    assert found.documents == 3
    ends = np.flatnonzero(found.tokens == tokenizer.eos_id)
    assert len(ends) == 3
    assert tokenizer.decode(found.tokens[ends[0] + 1 : ends[1]]) == text


def test_a_huge_line_is_a_document(tokenizer, tmp_path, monkeypatch):
    text = "alpha beta " * 200_000
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "' + text + '"}\n{"text": "two"}\n')
    largest = []
    original = encode.Tokenizer.encode
    monkeypatch.setattr(
        "mosaic_dist.data.encode.Tokenizer.encode", lambda self, text: largest.append(len(text)) or original(self, text)
    )
    monkeypatch.setattr("mosaic_dist.data.encode.PIECE_CHARACTERS", 100_000)
    source = read_documents([str(tmp_path / "a.jsonl")])
    info = prepare(source, tokenizer, tmp_path / "set", SEQ_LEN, workers=1, validation_fraction=0.0)
    assert info.splits["train"].documents == 3
    assert info.splits["train"].text_bytes == len(text) + 6
    assert (len(largest), max(largest)) == (22, 100_000)  # what is encoded at a time, and so its memory, is bounded
