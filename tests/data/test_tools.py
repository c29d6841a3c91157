import json

import pytest

from data_prep.inspect_dataset import inspect_dataset
from data_prep.tokenize_to_mds import tokenize_to_mds
from data_prep.train_tokenizer import train_tokenizer
from data_prep.verify_dataset import verify_dataset
from mosaic_dist.cli import run_command
from mosaic_dist.data.arithmetic import prepare_arithmetic
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.encode import split_of
from mosaic_dist.data.expressions import Expressions
from mosaic_dist.data.tokenizer import Tokenizer, train_bpe
from tests.data import foreign


def run(function, *words: object) -> None:
    run_command(function, "tool", [str(word) for word in words])


def test_text_to_dataset(documents, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(documents[:150]), newline="")
    (tmp_path / "b.txt").write_text("\n".join(documents[150:]), newline="")
    vocabulary, output = tmp_path / "tokenizer.json", tmp_path / "set"
    run(train_tokenizer, "--input", f"{tmp_path}/a.txt,{tmp_path}/b.txt", "--vocab_size", 280, "--output", vocabulary)
    words = ("--tokenizer", vocabulary, "--output", output, "--seq_len", 32, "--workers", 1)
    run(tokenize_to_mds, "--input", tmp_path / "a.txt", tmp_path / "b.txt", *words, "--compression", "zstd")
    info = DatasetInfo.load(output)
    assert (info.seq_len, info.vocab_size, info.splits["train"].documents) == (32, 280, 2)
    assert [source["name"] for source in info.sources] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert "bytes of text per token" in capsys.readouterr().err


def test_options_choose_the_ends_of_documents(documents, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(documents))
    words = ("--input", tmp_path / "a.txt", "--tokenizer", foreign.llama3(tmp_path / "llama3"), "--workers", 1)
    run(tokenize_to_mds, *words, "--output", tmp_path / "plain", "--seq_len", 16)
    assert "puts '<|begin_of_text|>' before each prompt, but no document will begin with it" in capsys.readouterr().err
    chosen = ("--eos", "<|end_of_text|>", "--bos", "<|eom_id|>", "--add_bos_token")
    run(tokenize_to_mds, *words, "--output", tmp_path / "chosen", "--seq_len", 16, *chosen)
    assert "no document will begin" not in capsys.readouterr().err
    plain, other = (DatasetInfo.load(tmp_path / name) for name in ("plain", "chosen"))
    ends = Tokenizer.load(tmp_path / "llama3").stop_ids  # <|eot_id|>, <|end_of_text|>, <|eom_id|>
    assert (plain.eos_id, plain.bos_id) == (ends[0], None)
    assert (other.eos_id, other.bos_id) == (ends[1], ends[2])
    assert set(other.load_tokenizer().stop_ids) == set(ends)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--input", "x", "--vocabsize", 300), "unknown flag --vocabsize; did you mean 'vocab_size'?"),
        (("--input", "x"), "--vocab_size is needed"),
        (("--input", "no/such/file", "--vocab_size", 300), "input 'no/such/file' does not exist"),
        (("--vocab_size", 300), "either with --input"),
        (("--input", "x", "--vocab_size", 0), "0 must be at least 1"),
        (("--input", "x", "--vocab_size", 300, "--kind", "word"), "--kind"),
        (("--input", "x", "--vocab_size", 300, "--kind", "unigram", "--min_frequency", 3), "is for --kind bpe"),
        (("--input", "x", "--vocab_size", 300, "--compare", "no/such.json"), "no tokenizer at no/such.json"),
        (
            ("--input", __file__, "--vocab_size", 300, "--held_out", 1),
            "held_out (1.0) must be at least 0 and less",
        ),
    ],
)
def test_mistakes_are_one_message(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        run(train_tokenizer, *words, "--output", tmp_path / "tokenizer.json")
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("function", [train_tokenizer, tokenize_to_mds])
def test_help(function, capsys):
    with pytest.raises(SystemExit):
        run(function, "--help")
    assert "--input takes files, folders and globs" in capsys.readouterr().out


@pytest.mark.parametrize("function", [verify_dataset, inspect_dataset])
def test_the_other_tools_want_one_folder(function, capsys, tmp_path):
    for words, message in [((), "give one folder, not 0"), ((tmp_path / "x",), "no dataset at")]:
        with pytest.raises(SystemExit) as end:
            run(function, *words)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_bytes_per_token_on_held_out_documents(documents, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    other, output = tmp_path / "other.json", tmp_path / "new.json"
    train_bpe(documents, 270).save(other)
    words = ("--held_out", 0.2, "--compare", other)
    run(train_tokenizer, "--input", rows, "--vocab_size", 300, "--output", output, *words)
    held_out = [text for text in documents if split_of(text.encode(), 0.2) == "validation"]
    learnt = [text for text in documents if split_of(text.encode(), 0.2) == "train"]
    assert Tokenizer.load(output).digest == train_bpe(learnt, 300).digest
    size = sum(len(text.encode()) for text in held_out)
    first, _, *table = capsys.readouterr().out.splitlines()
    assert first == f"held out: {len(held_out)} of 300 documents, {size:,} bytes"
    for line, path in zip(table, (output, other), strict=True):
        tokenizer = Tokenizer.load(path)
        tokens = sum(len(tokenizer.encode(text)) for text in held_out)
        expected = [str(path), str(tokenizer.vocab_size), f"{tokens:,}", f"{size / tokens:.3f}"]
        assert line.split() == expected


def test_without_held_out_documents_nothing_is_claimed(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one two three " * 30)
    run(train_tokenizer, "--input", tmp_path / "a.txt", "--vocab_size", 262, "--output", tmp_path / "t.json")
    told = capsys.readouterr().out
    assert "held out: 0 of 1 documents" in told
    assert "no bytes per token were measured" in told


def test_verify_tells_people_and_programs(dataset, tmp_path, capsys):
    run(verify_dataset, dataset.path)
    assert capsys.readouterr().out.endswith("in shards, whole\n")
    run(verify_dataset, dataset.path, "--json", "--threads", 1)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["whole"], facts["problems"]) == (True, [])
    sizes = {file: file.stat().st_size for file in dataset.path.rglob("*") if file.is_file()}
    assert facts["files"] == len(sizes)
    assert facts["size_bytes"] == sum(size for file, size in sizes.items() if file.suffix == ".mds")
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(SystemExit) as end:
        run(verify_dataset, tmp_path)
    assert end.value.code == 1
    assert f"{tmp_path / 'dataset.json'} " in capsys.readouterr().out


def test_inspect_tells_people_and_programs(dataset, documents, tmp_path, capsys):
    picture = tmp_path / "made" / "lengths.png"
    run(inspect_dataset, dataset.path, "--plot", picture, "--split", "validation", "--samples", 50)
    told = capsys.readouterr().out
    assert "--- sample 0 of" in told
    assert "⟦eos⟧" in told
    assert "documents of validation" in told
    assert picture.read_bytes().startswith(b"\x89PNG")
    run(inspect_dataset, dataset.path, "--json", "--samples", 4)
    facts = json.loads(capsys.readouterr().out)
    train = [text for text in documents if split_of(text.encode(), 0.2) == "train"]
    assert train[0].startswith(facts["samples"][0]["text"].rstrip("\ufffd"))  # a sample is shorter than a document
    total = facts["splits"]["train"]["samples"]
    assert [row["sample"] for row in facts["samples"]] == [i * total // 4 for i in range(4)]
    assert facts["lengths"]["documents"] in (len(train), len(train) - 1)  # the last may be cut


def test_inspect_lists_tokens_of_sources(documents, tokenizer, tmp_path, capsys):
    names = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for name, part in zip(names, (documents[:50], documents[50:]), strict=True):
        name.write_text("\n".join(part), newline="")
    tokenizer.save(tmp_path)
    words = ("--tokenizer", tmp_path, "--output", tmp_path / "set", "--seq_len", 32, "--workers", 1)
    run(tokenize_to_mds, "--input", *names, *words)
    run(inspect_dataset, tmp_path / "set", "--samples", 0)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    tokens = [len(tokenizer.encode(name.read_bytes().decode())) + 1 for name in names]
    for name, count in zip(names, tokens, strict=True):
        assert [f"{count:,}", f"{100 * count / sum(tokens):.1f}%", "1", str(name)] in table


def test_inspect_shows_questions(tmp_path, capsys):
    made = prepare_arithmetic(Expressions(operands=2, low=0, high=9, ops="+"), tmp_path / "set", 50, seq_len=16)
    run(inspect_dataset, made.path, "--samples", 1)
    told = capsys.readouterr().out
    first = json.loads((made.path / "train.jsonl").read_text().splitlines()[0])["text"]
    assert f"⟦bos⟧{first}⟦eos⟧⟦pad⟧ x {17 - len(first) - 2}" in told
