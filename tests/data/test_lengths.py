import itertools
from collections import Counter

import numpy as np
import pytest

from mosaic_dist.data import lengths as lengths_module
from mosaic_dist.data.arithmetic import prepare_arithmetic, read_rows
from mosaic_dist.data.encode import split_of
from mosaic_dist.data.expressions import Expressions
from mosaic_dist.data.length_plot import BINS, bin_edges, plot_lengths
from mosaic_dist.data.lengths import Lengths, measure_lengths
from mosaic_dist.data.show import excerpt, printable, visible_text
from mosaic_dist.errors import UserError


@pytest.mark.parametrize("chunk_tokens", [1, 100, 1 << 22])
def test_lengths_are_those_of_the_documents(dataset, documents, tokenizer, chunk_tokens, monkeypatch):
    monkeypatch.setattr(lengths_module, "CHUNK_TOKENS", chunk_tokens)
    for split, info in dataset.splits.items():
        found = measure_lengths(dataset, split)
        expected, left = [], info.tokens + 1  # each sample but the last shares a token with the next
        for text in documents:
            length = len(tokenizer.encode(text)) + 1
            if split_of(text.encode(), 0.2) == split and length <= left:
                expected.append(length)
                left -= length
            elif split_of(text.encode(), 0.2) == split:
                break
        assert found.counts == Counter(expected)
        assert found.open_tokens == left


def test_figures_are_those_of_a_sorted_list():
    generator = np.random.default_rng(0)
    plain = sorted(generator.integers(1, 60, 501).tolist())
    found = Lengths()
    for part in np.array_split(np.array(plain), 4):
        found.add(part)
    assert found.describe() == {
        "documents": 501,
        "shortest": plain[0],
        "median": plain[250],
        "mean": pytest.approx(sum(plain) / 501),
        "p90": plain[450],
        "p99": plain[495],
        "longest": plain[-1],
        "open_tokens": 0,
    }


def test_rows_of_questions_end_at_their_padding(tmp_path):
    info = prepare_arithmetic(Expressions(operands=2, low=0, high=99, ops="+"), tmp_path / "set", 80, seq_len=20)
    found = measure_lengths(info, "train")
    assert found.counts == Counter(len(row.text) + 2 for row in read_rows(info.path, "train"))


def test_bins_hold_every_length_once():
    for shortest, longest in [(1, 1), (9, 14), (1, 100_000), (7, 60), (3, 10**9)]:
        edges = bin_edges(shortest, longest)
        assert edges[0] == shortest
        assert edges[-1] == longest + 1
        assert (np.diff(edges) >= 1).all()
        assert 2 <= len(edges) <= BINS + 1
    values = np.arange(5, 300)
    counts = values % 7
    drawn, edges = np.histogram(values, bin_edges(5, 299), weights=counts)
    plain = [sum(v % 7 for v in range(low, high)) for low, high in itertools.pairwise(edges)]
    assert drawn.tolist() == plain


def test_a_picture(tmp_path):
    from matplotlib import image

    for name, documents in {"wide": [1, 5, 5, 900, 40_000], "narrow": [3, 4], "one": [7]}.items():
        found = Lengths()
        found.add(np.array(documents))
        plot_lengths(found, tmp_path / f"{name}.png", name, 64)
        assert image.imread(tmp_path / f"{name}.png").shape[:2] == (540, 960)
    with pytest.raises(UserError, match="no document ends in this split"):
        plot_lengths(Lengths(), tmp_path / "none.png", "none", 64)
    assert Lengths().describe() == {"documents": 0, "open_tokens": 0}


def test_special_tokens_are_told_from_text_that_looks_like_them(tokenizer):
    text = "<|eos|> and\n<|pad|>"
    ids = [1, *tokenizer.encode(text), 2, *tokenizer.encode("b"), 2, 0, 0, 0]
    assert visible_text(tokenizer, ids) == f"⟦bos⟧{text}⟦eos⟧\nb⟦eos⟧⟦pad⟧ x 3"
    assert visible_text(tokenizer, [2, 2]) == "⟦eos⟧ x 2"


def test_nothing_reaches_the_terminal_but_text():
    assert printable("a\x1b[2J\x07\r\tb\u202e\x00é🙂\n") == "a\\x1b[2J\\x07\\r  b\\u202e\\x00é🙂\n".replace(
        "  b", "    b"
    )
    shown = excerpt("\n".join(["x" * 50] * 20), columns=10, lines=3).split("\n")
    assert shown == ["xxxxxxxxx…"] * 3 + ["… 17 more lines"]
    assert excerpt("short", 10) == "short"
