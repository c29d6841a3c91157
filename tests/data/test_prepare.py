import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from mosaic_dist.data import mds
from mosaic_dist.data.batch import document_numbers
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.encode import split_of
from mosaic_dist.data.lengths import measure_lengths
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.shards import Shards
from mosaic_dist.data.sources import read_documents
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from tests.data import foreign
from tests.data.conftest import SEQ_LEN, assert_gone, children, make_documents, same_files


def read_split(info: DatasetInfo, split: str) -> np.ndarray:
    shards = Shards(info, split)
    return shards.read(np.arange(len(shards)))


def test_packing_is_what_a_simple_loop_gives(dataset, documents, tokenizer):
    for split in ("train", "validation"):
        stream = []
        mine = [text for text in documents if split_of(text.encode(), 0.2) == split]
        for text in mine:
            stream += [*tokenizer.encode(text), tokenizer.eos_id]
        expected, at = [], 0
        while at + SEQ_LEN + 1 <= len(stream):
            expected.append(stream[at : at + SEQ_LEN + 1])
            at += SEQ_LEN
        info = dataset.splits[split]
        assert read_split(dataset, split).tolist() == expected
        assert info.documents == len(mine)
        assert info.tokens + info.dropped_tokens == len(stream) - 1  # the first token is never a target
        assert info.shards > 1


def test_documents_between_chosen_tokens(documents, tmp_path):
    words = Tokenizer.load(foreign.qwen(tmp_path / "qwen"), eos="<|endoftext|>", bos="<s>")
    options = {"validation_fraction": 0.2, "workers": 2, "add_bos_token": True}
    info = prepare(documents, words, tmp_path / "set", SEQ_LEN, **options)
    mine = [text for text in documents if split_of(text.encode(), 0.2) == "train"]
    stream = [token for text in mine for token in (words.bos_id, *words.encode(text), words.eos_id)]
    rows_BT = read_split(info, "train")
    assert [*rows_BT[:, :-1].ravel(), rows_BT[-1, -1]] == stream[: rows_BT.shape[0] * SEQ_LEN + 1]
    assert (info.bos_id, info.eos_id) == (words.bos_id, words.eos_id)
    assert measure_lengths(info, "train").counts[len(words.encode(mine[0])) + 2] > 0
    inputs_BT = torch.from_numpy(rows_BT[:, :-1].astype(np.int64))
    numbers_BT = document_numbers(inputs_BT, info.eos_id)
    begins_BT = numbers_BT[:, 1:] > numbers_BT[:, :-1]
    assert begins_BT.any()
    assert torch.equal(begins_BT, inputs_BT[:, 1:] == words.bos_id)  # a BOS belongs to the document that it begins
    again = info.load_tokenizer()
    assert (again.tokens, again.stop_ids) == (words.tokens, words.stop_ids)
    assert again.encode_prompt("x") == [words.bos_id, *words.encode("x")]
    file = info.path / "tokenizer_config.json"
    file.write_text(file.read_text().replace("<s>", "<|im_start|>"))
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not the one that .*dataset\.json describes"):
        DatasetInfo.load(info.path)
    file.unlink()
    with pytest.raises(UserError, match=r"tokenizer_config\.json is missing"):
        DatasetInfo.load(info.path)


def test_text_that_encodes_to_the_end_is_refused(tmp_path):
    words = Tokenizer.load(foreign.qwen(tmp_path / "qwen"), eos="z")  # an ordinary letter
    prepare(["the tokens"] * 20, words, tmp_path / "set", SEQ_LEN, validation_fraction=0.0, workers=1)
    with pytest.raises(UserError, match=r"encodes to the end-of-document token 'z' \(id \d+\), .* name another --eos"):
        prepare(["the z"] * 20, words, tmp_path / "other", SEQ_LEN, validation_fraction=0.0, workers=1)
    assert not (tmp_path / "other").exists()


def test_text_comes_back(dataset, documents, tokenizer):
    samples = read_split(dataset, "train")
    stream = [*samples[:, :-1].ravel(), samples[-1, -1]]
    texts, begin = [], 0
    for at, token in enumerate(stream):
        if token == tokenizer.eos_id:
            texts.append(tokenizer.decode(stream[begin:at]))
            begin = at + 1
    assert texts == [text for text in documents if split_of(text.encode(), 0.2) == "train"][: len(texts)]
    assert len(texts) > 200


def test_bytes_do_not_depend_on_workers(documents, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("mosaic_dist.data.encode.BATCH_BYTES", 1000)  # many batches
    prepare(documents, tokenizer, tmp_path / "one", SEQ_LEN, workers=1)
    prepare(documents, tokenizer, tmp_path / "two", SEQ_LEN, workers=2)
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_splits_are_stable(documents):
    before = {text: split_of(text.encode(), 0.2) for text in documents}
    share = sum(split == "validation" for split in before.values()) / len(before)
    assert 0.1 < share < 0.3
    larger = {text: split_of(text.encode(), 0.3) for text in documents}
    assert all(larger[text] == "validation" for text in documents if before[text] == "validation")


def test_tiny_corpus_has_a_validation_sample(tokenizer, tmp_path):
    texts = make_documents(4)
    whole = prepare(texts, tokenizer, tmp_path / "whole", SEQ_LEN, validation_fraction=0.0, workers=1)
    assert list(whole.splits) == ["train"]
    info = prepare(texts, tokenizer, tmp_path / "tiny", SEQ_LEN, validation_fraction=1e-9, workers=1)
    assert info.options["validation_from_train"]
    together = np.concatenate([read_split(info, "train"), read_split(info, "validation")])
    assert (together == read_split(whole, "train")).all()
    assert info.splits["train"].dropped_tokens == whole.splits["train"].dropped_tokens
    with pytest.raises(UserError, match=r"1 bytes of text give 0 of train and 0 of validation samples"):
        prepare(["x"], tokenizer, tmp_path / "none", SEQ_LEN, workers=1)
    assert not list(tmp_path.glob("none*"))


def test_compressed_dataset_reads_the_same(documents, tokenizer, dataset, tmp_path):
    info = prepare(
        documents, tokenizer, tmp_path / "set", SEQ_LEN, validation_fraction=0.2, workers=1, compression="zstd:1"
    )
    assert not list((tmp_path / "set").rglob("*.mds"))
    assert (read_split(info, "train") == read_split(dataset, "train")).all()
    raw = next((tmp_path / "set" / "train").glob("*.mds"))
    raw.write_bytes(raw.read_bytes()[:-1] + b"\xff")  # a damaged inflated shard is made again
    assert (read_split(info, "train") == read_split(dataset, "train")).all()


def test_large_vocabulary_takes_uint32(tmp_path):
    words = {"[UNK]": 0, "high": 70_000}  # ids need not be dense
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>"])
    info = prepare(
        ["high " * 40], Tokenizer(inner.to_str()), tmp_path / "set", SEQ_LEN, validation_fraction=0.0, workers=1
    )
    assert (info.dtype, info.vocab_size) == ("uint32", 70_001)
    assert (read_split(info, "train") == 70_000).all()


def test_inputs_are_counted(documents, tokenizer, tmp_path):
    for name, texts in (("a", documents[:100]), ("b", documents[100:250]), ("c", documents[250:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = [str(tmp_path / "b.jsonl"), str(tmp_path / "*.jsonl")]
    info = prepare(read_documents(inputs), tokenizer, tmp_path / "set", SEQ_LEN, workers=2)
    expected = []
    for name, texts in zip(inputs, (documents[100:250], documents[:100] + documents[250:]), strict=True):
        tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
        size = sum(len(text.encode()) for text in texts)
        expected.append({"name": name, "documents": len(texts), "text_bytes": size, "tokens": tokens})
    assert info.sources == expected
    assert "*.jsonl: 150 documents" in info.summary()
    file = tmp_path / "set" / "dataset.json"
    told = json.loads(file.read_text())
    del told["xxh3_128"]
    file.write_text(json.dumps(told | {"sources": inputs}))  # as the first version wrote it
    assert DatasetInfo.load(tmp_path / "set").sources == [{"name": name} for name in inputs]
    assert "b.jsonl: not counted" in DatasetInfo.load(tmp_path / "set").summary()


def test_streaming_reads_the_shards(dataset):
    from streaming.base.format import reader_from_json  # takes seconds

    for split in ("train", "validation"):
        samples = read_split(dataset, split)
        begin = 0
        for entry in dataset.index(split):
            reader = reader_from_json(str(dataset.path / split), None, entry)
            assert all((reader.get_item(i)[mds.COLUMN] == samples[begin + i]).all() for i in range(len(reader)))
            begin += len(reader)
            assert (dataset.path / split / entry["raw_data"]["basename"]).stat().st_size == entry["raw_data"]["bytes"]
        assert begin == len(samples)


def test_existing_output(documents, tokenizer, tmp_path):
    output = tmp_path / "set"
    prepare(documents, tokenizer, output, SEQ_LEN, workers=1)
    with pytest.raises(UserError, match="exists already"):
        prepare(documents, tokenizer, output, SEQ_LEN, workers=1)

    def fails():
        yield from documents
        raise UserError("broken source")

    with pytest.raises(UserError, match="broken source"):
        prepare(fails(), tokenizer, output, SEQ_LEN, workers=1, overwrite=True)
    assert DatasetInfo.load(output).seq_len == SEQ_LEN
    assert prepare(documents, tokenizer, output, 8, workers=1, overwrite=True).seq_len == 8
    (tmp_path / "precious").mkdir()
    with pytest.raises(UserError, match="is no dataset"):
        prepare(documents, tokenizer, tmp_path / "precious", SEQ_LEN, workers=1, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "set"]


def test_bad_options(documents, tokenizer, tmp_path):
    for options, message in (
        ({"seq_len": 0}, "seq_len"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"workers": 0}, "workers"),
        ({"compression": "rar"}, "compression 'rar' is unknown; known: .*zstd"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(documents, tokenizer, tmp_path / "set", **({"seq_len": SEQ_LEN} | options))


def test_a_workers_failure_ends_everything(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("mosaic_dist.data.encode.BATCH_BYTES", 1000)
    endless = (text for i in range(10**9) for text in ("x" * 100, "\ud800" if i == 30 else "y"))
    with pytest.raises(TypeError):  # the sources refuse half a surrogate pair; this one got by them
        prepare(endless, tokenizer, tmp_path / "set", SEQ_LEN, workers=2)

    def killer():
        for i in range(10**9):
            if i == 1000:
                multiprocessing.active_children()[0].kill()
            yield "x" * 100

    with pytest.raises(UserError, match="a tokenising worker was killed"):
        prepare(killer(), tokenizer, tmp_path / "set", SEQ_LEN, workers=2)
    assert not list(tmp_path.iterdir())


ENDLESS = """
import sys
from mosaic_dist.cli import run_command
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.tokenizer import Tokenizer

def endless():
    for i in range(10**9):
        if i == 3000:
            print("under way", flush=True)
        yield f"document {i} " * 100

def tool() -> None:
    prepare(endless(), Tokenizer.load(sys.argv[1]), sys.argv[2], 64, workers=2)

if __name__ == "__main__":
    run_command(tool, "tool", [])
"""


def ignores_ctrl_c(process: int) -> bool:
    """Whether a process has set SIGINT aside."""
    (mask,) = re.findall(r"^SigIgn:\t(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_ctrl_c_while_workers_start(tokenizer, tmp_path, processes):
    """The resource tracker, the fork server and the two workers come one after another."""
    tokenizer.save(tmp_path)
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    command = [sys.executable, str(script), str(tmp_path), str(tmp_path / "out" / "set")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        while len(workers := children(process.pid)) < processes:
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        assert (process.communicate(timeout=60)[1], process.returncode) == ("interrupted\n", 130)
    assert_gone(workers)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_kill_and_ctrl_c_leave_nothing_visible(documents, tokenizer, tmp_path, number):
    """Ctrl-C in a terminal reaches the workers too, but one line is all that is said."""
    tokenizer.save(tmp_path)
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    output = tmp_path / "out" / "set"
    command = [sys.executable, str(script), str(tmp_path), str(output)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "under way\n"
        while not all(map(ignores_ctrl_c, workers := children(process.pid))):  # they are still starting
            time.sleep(0.05)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
            assert (process.stderr.read(), process.wait()) == ("interrupted\n", 130)
        else:
            process.send_signal(number)
    assert len(workers) >= 2
    assert_gone(workers)
    assert not output.exists()
    assert len(list(output.parent.iterdir())) == (number == signal.SIGKILL)
    prepare(documents, tokenizer, output, SEQ_LEN, workers=1)  # also clears what the kill left
    assert [path.name for path in output.parent.iterdir()] == ["set"]
