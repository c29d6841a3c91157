"""A preparation that is killed goes on and ends with the bytes of an undisturbed one; or is refused with the reason."""

import fcntl
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mosaic_dist.data import journal
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.sources import Documents, given_documents, hugging_face_documents, read_documents
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.data.tokenizer_config import TokenizerConfig
from mosaic_dist.errors import UserError
from tests.data.conftest import SEQ_LEN, same_files

LAST = "the last one, which is long enough"
ROOT = Path(__file__).parents[2]


def rows(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def often(monkeypatch):
    """Small batches and a journal entry behind each."""
    monkeypatch.setattr("mosaic_dist.data.encode.BATCH_BYTES", 1500)
    monkeypatch.setattr("mosaic_dist.data.journal.SECONDS", 0.0)
    monkeypatch.setattr("mosaic_dist.data.journal.SHARE", 1e9)


@pytest.fixture
def broken(monkeypatch):
    """Reading that fails behind a number of documents, once."""

    def fail_behind(count: int) -> None:
        whole = Documents.read

        def read(self, *start):
            monkeypatch.setattr(Documents, "read", whole)
            for i, document in enumerate(whole(self, *start)):
                if i == count:
                    raise OSError("the disk is gone")
                yield document

        monkeypatch.setattr(Documents, "read", read)

    return fail_behind


def test_killed_at_random_moments(documents, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_bytes(rows(documents[:100]))
    (source / "b.jsonl.gz").write_bytes(gzip.compress(rows(["", "short", *documents[50:200]]), mtime=0))
    (source / "c.png").write_bytes(b"\xff")
    pq.write_table(pa.table({"text": documents[150:]}), source / "d.parquet", row_group_size=30)
    (source / "e.txt").write_text(LAST)
    command = [sys.executable, "-m", "tests.data.killed_preparation", tmp_path, source, tmp_path / "out", "7"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    killed = json.loads(found.stdout)
    assert len(killed) == 10
    assert all(len(steps) >= 1 for steps in killed)
    assert sum(map(len, killed)) > 20
    assert found.stderr.count("going on behind document") > 10
    info = DatasetInfo.load(tmp_path / "out" / "whole")
    met = [*documents[:100], "short", *documents[50:200], *documents[150:], LAST]
    kept = [text for text in met if len(text.encode()) >= 20]
    assert sum(split.documents for split in info.splits.values()) == len(set(kept)) > 200
    assert info.duplicate_documents == len(kept) - len(set(kept)) > 50
    assert info.filtered_documents == len(met) - len(kept)
    assert (info.empty_documents, info.skipped_files) == (1, 1)
    assert info.splits["train"].shards > 5
    for number in range(10):
        assert same_files(tmp_path / "out" / "whole", tmp_path / "out" / str(number))
    for left in (tmp_path / "out").glob("*.unfinished"):  # of those that were killed behind the last step that counts
        with pytest.raises(UserError, match="exists already"):
            prepare(documents, tokenizer, left.with_suffix(""), SEQ_LEN, workers=1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*map(str, range(10)), "whole"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "files", "hub"])
def test_every_kind_of_input_goes_on(kind, documents, tokenizer, tmp_path, often, broken, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = tmp_path / "in"
    source.mkdir()
    if kind == "files":
        for i, text in enumerate(documents[:120]):
            (source / f"{i:03}.txt").write_text(text)
    elif kind == "jsonl":
        (source / "a.jsonl").write_bytes(b"\n\n" + rows(documents))
    elif kind == "jsonl.gz":
        (source / "a.jsonl.gz").write_bytes(b"".join(gzip.compress(rows(documents[i::2]), mtime=0) for i in range(2)))
    else:
        pq.write_table(pa.table({"text": documents}), source / "train.parquet", row_group_size=70)

    def read() -> Documents:
        return hugging_face_documents(str(source)) if kind == "hub" else read_documents([str(source)])

    def make(name: str, workers: int) -> None:
        prepare(read(), tokenizer, tmp_path / name, SEQ_LEN, workers=workers)

    make("whole", 1)
    broken(110)
    with pytest.raises((OSError, UserError), match="the disk is gone"):
        make("again", 1)
    capsys.readouterr()
    make("again", 2)  # the number of workers may change
    assert "going on behind document" in capsys.readouterr().err
    assert same_files(tmp_path / "whole", tmp_path / "again")


def unfinished(documents, tokenizer, folder, broken) -> tuple[Path, Path]:
    """An input and an output whose preparation has failed."""
    source = folder / "a.jsonl"
    source.write_bytes(rows(documents))
    broken(150)
    with pytest.raises(OSError, match="gone"):
        prepare(read_documents([str(source)]), tokenizer, folder / "set", SEQ_LEN, workers=1)
    assert (folder / "set.unfinished" / "progress.json").is_file()
    assert not (folder / "set").exists()
    return source, folder / "set"


def test_another_command_is_refused(documents, tokenizer, tmp_path, often, broken):
    source, output = unfinished(documents, tokenizer, tmp_path, broken)
    for options, message in (
        ({"seq_len": 8}, "seq_len was 16 and is 8"),
        ({"deduplicate": True}, "deduplicate was False and is True"),
        ({"add_bos_token": True}, "add_bos_token was False and is True"),
        (
            {"max_document_bytes": 50, "compression": "zstd"},
            "compression was None .*max_document_bytes was None",
        ),
    ):
        with pytest.raises(UserError, match=f"of 1.. documents that cannot go on .*{message}.*--restart"):
            prepare(read_documents([str(source)]), tokenizer, output, workers=1, **({"seq_len": SEQ_LEN} | options))
    other_end = Tokenizer(tokenizer.to_json(), config=TokenizerConfig(tokens={"eos_token": "<|pad|>"}))
    with pytest.raises(UserError, match="eos_id was 2 and is 0"):
        prepare(read_documents([str(source)]), other_end, output, SEQ_LEN, workers=1)
    with pytest.raises(UserError, match="given by a program"):
        prepare(documents, tokenizer, output, SEQ_LEN, workers=1)
    source.write_bytes(rows(documents[1:]))
    (tmp_path / "b.txt").write_text("new")
    with pytest.raises(UserError, match=r"changed: .*a\.jsonl; input was .*; new: .*b\.txt"):
        prepare(read_documents([str(source), str(tmp_path / "b.txt")]), tokenizer, output, SEQ_LEN, workers=1)
    info = prepare(read_documents([str(source)]), tokenizer, output, SEQ_LEN, workers=1, restart=True)
    assert sum(split.documents for split in info.splits.values()) == len(documents) - 1
    assert not output.with_name("set.unfinished").exists()


def test_damaged_progress_is_told(documents, tokenizer, tmp_path, often, broken):
    source, output = unfinished(documents, tokenizer, tmp_path, broken)
    aside = tmp_path / "set.unfinished"
    (tokens,) = aside.glob("train.*.tokens")
    for path, content in ((tokens, tokens.read_bytes()[:-1]), (aside / "progress.json", b'{"mark": ')):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot go on: give --restart"):
            prepare(read_documents([str(source)]), tokenizer, output, SEQ_LEN, workers=1)


def test_one_process_at_a_time(documents, tokenizer, tmp_path):
    aside = tmp_path / "set.unfinished"
    aside.mkdir()
    with open(aside / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process is making this output right now: it holds .*lock"):
            prepare(documents, tokenizer, tmp_path / "set", SEQ_LEN, workers=1)
        assert aside.exists()
    prepare(documents, tokenizer, tmp_path / "set", SEQ_LEN, workers=1)
    assert os.listdir(tmp_path) == ["set"]


def test_texts_of_a_program_keep_no_progress(documents, tokenizer, tmp_path, often):
    def fails():
        yield from documents
        raise UserError("broken source")

    with pytest.raises(UserError, match="broken source"):
        prepare(fails(), tokenizer, tmp_path / "set", SEQ_LEN, workers=1)
    assert not list(tmp_path.iterdir())
    assert given_documents(documents).identity() is None


def test_the_journal_waits_for_a_slow_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("mosaic_dist.data.journal.SHARE", 0.05)
    clock = iter([0.0, 30.0, 30.0, 40.0, 239.0, 240.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    kept = journal.Journal(tmp_path, {"option": 1})
    assert kept.is_due()
    kept.save(kept.mark, [], {}, None)  # takes ten seconds
    assert not kept.is_due()
    assert kept.is_due()


@pytest.mark.parametrize("seed", range(3))
def test_reading_goes_on_at_every_place(seed, documents, tmp_path):
    generator = random.Random(seed)
    texts = generator.sample(documents, 40)
    (tmp_path / "a.jsonl").write_bytes(b"\n" + rows(["", *texts[:10], ""]) + b"\n\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows(texts[10:20]), mtime=0))
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / "d.txt").write_text(texts[20], newline="")
    pq.write_table(pa.table({"text": texts[21:]}), tmp_path / "e.parquet", row_group_size=generator.randint(1, 30))
    source = read_documents([str(tmp_path)])
    whole = list(source.read())
    assert [document.text for document in whole] == texts
    ends = source.empty, source.skipped, source.done_bytes
    for i, document in enumerate(whole):
        assert list(source.read(document.place)) == whole[i + 1 :]
        assert (source.empty, source.skipped, source.done_bytes) == ends
