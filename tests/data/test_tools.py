import pytest

from data_prep.tokenize_to_mds import tokenize_to_mds
from data_prep.train_tokenizer import train_tokenizer
from mosaic_dist.cli import run_command
from mosaic_dist.data.dataset import DatasetInfo


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
    assert info.sources == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert "bytes of text per token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--input", "x", "--vocabsize", 300), "unknown flag --vocabsize; did you mean 'vocab_size'?"),
        (("--input", "x"), "--vocab_size is needed"),
        (("--input", "no/such/file", "--vocab_size", 300), "input 'no/such/file' does not exist"),
        (("--vocab_size", 300), "either with --input"),
        (("--input", "x", "--vocab_size", 0), "0 must be at least 1"),
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
