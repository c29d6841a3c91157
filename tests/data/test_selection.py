import random

import pytest

from mosaic_dist.data.documents import Mark, Place
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.selection import Seen, Selection
from mosaic_dist.data.sources import given_documents
from mosaic_dist.errors import UserError
from tests.data.conftest import SEQ_LEN, same_files


def chosen(texts, *, low=0, high=None, seen=None) -> tuple[list[str], Selection]:
    selection = Selection(given_documents(texts), low, high, seen, Mark())
    return [found.text for found in selection], selection


def test_equal_texts_are_met_once(tmp_path):
    generator = random.Random(0)
    texts = [f"{generator.randrange(3000)}" for _ in range(5000)]
    seen = Seen(tmp_path / "seen")
    found, selection = chosen(texts, seen=seen)
    assert found == list(dict.fromkeys(texts))
    assert selection.duplicates == len(texts) - len(found) > 1000
    seen.sync()
    half = Seen(tmp_path / "seen", 1000)  # another process goes on behind the first thousand
    assert [text for text in found if half.add(text.encode())] == found[1000:]
    half.sync()
    with pytest.raises(UserError, match="seen is damaged"):
        Seen(tmp_path / "seen", 10_000)


def test_digests_are_compared_where_they_begin(tmp_path):
    seen = Seen(tmp_path / "seen")
    first, second = bytes(2) + bytes(range(14)), bytes(2) + bytes(range(14, 28))
    assert [seen._add(digest) for digest in (first, second, first)] == [True, True, False]
    between = bytes(2) + bytes(range(7, 21))  # the end of one and the start of the next
    assert [seen._add(digest) for digest in (between, between)] == [True, False]


def test_lengths_are_bytes(documents):
    found, selection = chosen(documents, low=30, high=200)
    assert found == [text for text in documents if 30 <= len(text.encode("utf-8")) <= 200]
    assert 0 < selection.filtered == len(documents) - len(found)
    assert chosen(["三", "ab", "三三"], low=3, high=3)[0] == ["三"]
    with pytest.raises(UserError, match=r"max_document_bytes \(2\) must be at least min_document_bytes \(3\)"):
        chosen(documents, low=3, high=2)


def test_marks_tell_what_was_left_out(tmp_path):
    texts = ["a", "long", "b", "b", "a", "c", "long"]
    marks = [found.mark for found in Selection(given_documents(texts), 0, 3, Seen(tmp_path / "seen"), Mark())]
    assert [(mark.place.row, mark.documents, mark.filtered, mark.duplicates) for mark in marks] == [
        (1, 1, 0, 0),
        (3, 2, 1, 0),
        (6, 3, 1, 2),
    ]
    assert marks[0].place == Place(row=1)


def test_a_dataset_of_the_chosen_ones(documents, tokenizer, tmp_path):
    options = {"min_document_bytes": 30, "max_document_bytes": 200, "deduplicate": True}
    info = prepare([*documents, *documents[::2]], tokenizer, tmp_path / "all", SEQ_LEN, workers=1, **options)
    kept = [text for text in documents if 30 <= len(text.encode()) <= 200]
    copies = [text for text in documents[::2] if text in kept]
    prepare(kept, tokenizer, tmp_path / "kept", SEQ_LEN, workers=1)
    for split in ("train", "validation"):
        assert same_files(tmp_path / "all" / split, tmp_path / "kept" / split)
    assert info.duplicate_documents == len(copies) > 50
    assert info.filtered_documents == 1.5 * len(documents) - len(kept) - len(copies)
    assert {name: info.options[name] for name in options} == options
    assert f"{len(copies)} copies" in info.summary()
    with pytest.raises(UserError, match="0 bytes of text give 0 of train"):
        prepare(documents, tokenizer, tmp_path / "none", SEQ_LEN, workers=1, min_document_bytes=10**6)
