"""Perplexity against one forward pass of transformers' GPT-2 per token, and against what is known without a model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mosaic_dist.data.characters import character_tokenizer
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.evaluate import passages
from mosaic_dist.evaluate.model_source import ModelSource
from mosaic_dist.evaluate.passages import split_at, stream
from mosaic_dist.evaluate.perplexity import Perplexity, add_up
from mosaic_dist.evaluate.ranks import meet
from mosaic_dist.evaluate.windows import batches, windows
from mosaic_dist.model import MHA, Block, SwiGLU, Transformer
from mosaic_dist.targets import IGNORE_INDEX
from tests.convert.twins import CONTEXT, make_twin
from tests.launch import check, run_ranks

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\nü"
TEXTS = [
    "the quick brown fox jumps over the lazy dog, and then over the fence.\nnobody saw it coming, least of all he.",
    "für",
    "a second document, which is to be told without the first one.",
]


def tokenizer(with_bos: bool) -> Tokenizer:
    document = json.loads(character_tokenizer(LETTERS).to_json())
    return Tokenizer(json.dumps(document if with_bos else document | {"post_processor": None}))


@pytest.fixture(scope="module")
def twin():
    return make_twin("gpt2")


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "eos"])
def folder(request, twin, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("twin") / "gpt2"
    twin.save_pretrained(path)
    tokenizer(request.param).save(path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@torch.no_grad()
def nats_one_by_one(twin, tokens: list[int], start: int, context: int, stride: int) -> float:
    """A forward pass for every token, over what it may see: from the last begin of a window whose end it is behind."""
    sequence, total = [start, *tokens], 0.0
    for place in range(1, len(sequence)):
        begin = max(0, math.ceil((place - context) / stride) * stride)
        logits_V = twin(torch.tensor([sequence[begin:place]])).logits[0, -1]
        total -= logits_V.double().log_softmax(-1)[sequence[place]].item()
    return total


@pytest.mark.parametrize(("context", "stride"), [(16, 1), (16, 5), (16, 16), (CONTEXT, 48)])
def test_every_token_gets_what_transformers_gives_it(twin, folder, text, context, stride):
    words = Tokenizer.load(folder)
    measured = Perplexity(data=str(text), context=context, stride=stride, batch=3).measure(
        ModelSource(model=str(folder)).open(), meet()
    )
    start = words.bos_id if words.encode_prompt("") else words.eos_id
    nats = sum(nats_one_by_one(twin, words.encode(text), start, context, stride) for text in TEXTS)
    tokens, text_bytes = sum(map(len, TEXTS)), sum(len(text.encode()) for text in TEXTS)
    assert text_bytes == tokens + 1  # the ü
    assert (measured["tokens"], measured["bytes"], measured["documents"]) == (tokens, text_bytes, 3)
    assert measured["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert measured["bits_per_token"] == pytest.approx(nats / tokens / math.log(2), rel=1e-5)
    assert measured["bits_per_byte"] == pytest.approx(nats / text_bytes / math.log(2), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = Transformer(
        vocab_size=37, dim=8, max_seq_len=8, layers=(Block(attention=MHA(heads=2), ffn=SwiGLU(hidden_dim=8)),)
    )
    network = model.build_initialized(0).eval()
    for parameter in network.parameters():
        parameter.data.zero_()
    found = [passages.Passage(np.arange(length, dtype=np.uint32) % 37, 2 * length) for length in (1, 8, 9, 30)]
    for stride in (1, 3, 8):
        nats, tokens, text_bytes, documents = add_up(network, found, 0, 8, stride, 4, True).tolist()
        assert (tokens, text_bytes, documents) == (48, 96, 4)
        assert math.exp(nats / tokens) == pytest.approx(37, rel=1e-6)


@pytest.mark.parametrize("stride", [1, 2, 5, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 23])
def test_each_token_is_scored_once_and_sees_enough(length, stride):
    context, tokens = 8, np.arange(100, 100 + length)
    scored = []
    for inputs_T, targets_T in windows(tokens, 7, context, stride):
        assert 1 <= len(inputs_T) <= context
        for place in np.flatnonzero(targets_T != IGNORE_INDEX).tolist():
            token = int(targets_T[place])
            scored.append(token)
            before = [7, *range(100, token)]
            assert inputs_T[: place + 1].tolist() == before[-place - 1 :]
            assert place + 1 >= min(len(before), context - stride + 1)
    assert scored == tokens.tolist()


def test_batches_keep_every_window():
    found = [window for length in (3, 30, 1, 12) for window in windows(np.arange(length), 0, 8, 3)]
    rows = []
    for inputs_BT, targets_BT in batches(found, 3):
        assert len(inputs_BT) <= 3
        for inputs_T, targets_T in zip(inputs_BT.tolist(), targets_BT.tolist(), strict=True):
            length = max(place for place, target in enumerate(targets_T) if target != IGNORE_INDEX) + 1
            rows.append((inputs_T[:length], targets_T[:length]))
            assert not any(inputs_T[length:])
    expected = [(window.inputs_T.tolist(), window.targets_T.tolist()) for window in found]
    assert sorted(rows) == sorted(expected)


def test_a_prepared_dataset_gives_the_documents_that_it_was_made_of(folder, text, tmp_path):
    words = Tokenizer.load(folder)
    longer = [*TEXTS, *(text[::-1] for text in TEXTS)]
    options = {"validation_fraction": 0.0, "workers": 1, "add_bos_token": words.adds_bos}
    info = prepare(longer, words, tmp_path / "data", 12, **options)
    found = [tokens.tolist() for tokens in split_at(stream(info, "train"), words.eos_id, info.bos_id)]
    *whole, cut = [words.encode(text) for text in longer]
    assert found[: len(whole)] == whole
    rest = found[len(whole) :]
    assert rest in ([], [cut[: len(rest[0])]] if rest else [])
    total = sum(len(words.encode(text)) + 1 + words.adds_bos for text in longer)
    kept = sum(map(len, stream(info, "train")))
    assert DatasetInfo.load(tmp_path / "data").split("train").dropped_tokens == total - kept
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": words.decode(tokens)}) + "\n" for tokens in found))
    opened = ModelSource(model=str(folder)).open()
    by_data, by_text = (
        Perplexity(data=str(data), split=split, stride=4, context=16).measure(opened, meet())
        for data, split in ((tmp_path / "data", "train"), (texts, None))
    )
    assert by_data["nats_per_token"] == by_text["nats_per_token"]
    assert by_data["bytes"] == by_text["bytes"] > by_data["tokens"]
    other = ModelSource(model=str(folder)).open()
    other.tokenizer_path = tmp_path / "tokenizer.json"
    character_tokenizer(LETTERS[::-1]).save(other.tokenizer_path)
    with pytest.raises(UserError, match="made with tokenizer"):
        Perplexity(data=str(tmp_path / "data"), split="train").measure(other, meet())


def test_the_first_documents_alone(folder, text, tmp_path):
    opened = ModelSource(model=str(folder)).open()
    (tmp_path / "one.txt").write_text(TEXTS[0])
    limited, one = (
        Perplexity(data=str(data), limit=limit).measure(opened, meet())
        for data, limit in ((text, 1), (tmp_path / "one.txt", None))
    )
    assert limited["documents"] == 1
    assert limited["nats_per_token"] == one["nats_per_token"]
    assert limited["stride"] == CONTEXT // 2


def test_bf16_is_near_and_not_the_same(folder, text):
    opened = ModelSource(model=str(folder)).open()
    full, half = (Perplexity(data=str(text), dtype=dtype).measure(opened, meet()) for dtype in ("fp32", "bf16"))
    assert half["nats_per_token"] == pytest.approx(full["nats_per_token"], rel=0.02)
    assert half["nats_per_token"] != full["nats_per_token"]


def test_two_ranks_give_what_one_gives(folder, text, tmp_path):
    words = ["evaluate", "--model", str(folder), "--task", "perplexity", "--data", str(text), "--context", "16"]
    told = []
    for ranks in (1, 2):
        output = tmp_path / f"{ranks}.json"
        check(run_ranks("mosaic_dist", ranks, *words, "--json_output", str(output), "--local_rank=0"))
        told.append(json.loads(output.read_text()))
    one, two = told
    assert two["nats_per_token"] == pytest.approx(one["nats_per_token"], rel=1e-6)
    for key in ("tokens", "bytes", "documents", "context", "stride"):
        assert one[key] == two[key]


def test_paragraphs_of_a_known_dataset_are_one_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "rows").mkdir()
    rows = ["", " = title = \n", "", " text. \n"]
    (tmp_path / "rows" / "test.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    monkeypatch.setitem(passages.KNOWN, "wikitext2", passages.Known(str(tmp_path / "rows"), "\n\n"))
    assert list(passages.find("wikitext2", "test", "text").texts) == ["\n\n = title = \n\n\n\n\n text. \n"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": CONTEXT + 1}, r"context \(65\) is more than the model's \(64\)"),
        ({"context": 8, "stride": 9}, r"stride \(9\) is more than the context \(8\)"),
        ({"split": "test"}, "is text: leave it out"),
        ({"field": "body"}, "has no field 'body'"),
    ],
)
def test_what_cannot_be_is_refused(folder, text, options, message):
    with pytest.raises(UserError, match=message):
        Perplexity(data=str(text), **options).measure(ModelSource(model=str(folder)).open(), meet())
