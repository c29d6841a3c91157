import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mosaic_dist.data.sources import choose_documents, hugging_face_documents, read_documents
from mosaic_dist.errors import UserError

TEXTS = ["one", "zwei\nzwei", "三"]


def jsonl(texts, field="text") -> bytes:
    return "".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def write(path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.jsonl.gz", lambda data: gzip.compress(data, mtime=0) + gzip.compress(b"", mtime=0)),
        ("a.jsonl.zst", lambda data: zstandard.compress(data[:20]) + zstandard.compress(data[20:])),
    ],
)
def test_jsonl(tmp_path, name, pack):
    found = read_documents([write(tmp_path / name, pack(jsonl(TEXTS)))])
    assert list(found) == TEXTS
    assert found.done_bytes == found.total_bytes == (tmp_path / name).stat().st_size
    assert list(found) == TEXTS  # can be read again


def test_parquet(tmp_path):
    table = pa.table({"body": TEXTS, "id": [0, 1, 2]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert list(read_documents([str(tmp_path / "a.parquet")], field="body")) == TEXTS
    with pytest.raises(UserError, match=r"a\.parquet has no field 'text'; it has: body, id"):
        list(read_documents([str(tmp_path)]))
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.parquet is not a whole Parquet file"):
        list(read_documents([str(tmp_path)]))


def test_folder_and_glob(tmp_path):
    write(tmp_path / "b" / "2.py", b"two\r\n")
    write(tmp_path / "b" / "1.md", b"one")
    write(tmp_path / "a.txt", b"zero")
    write(tmp_path / "c" / "picture.png", b"\x89PNG\xff")
    write(tmp_path / "c" / "empty.py", b"")
    write(tmp_path / ".git" / "config", b"hidden")
    write(tmp_path / "b" / "__pycache__" / "x.txt", b"cache")
    found = read_documents([str(tmp_path)])
    assert list(found) == ["zero", "one", "two\r\n"]
    assert found.skipped == 1
    assert found.empty == 1
    assert list(read_documents([str(tmp_path / "**" / "*.py"), str(tmp_path / "a.txt")])) == ["two\r\n", "zero"]
    assert next(iter(read_documents([str(tmp_path / "a.txt"), str(tmp_path)]))) == "zero"
    assert len(list(read_documents([str(tmp_path / "a.txt"), str(tmp_path)]))) == 3  # the twice named file once


def test_standard_library():
    found = read_documents(["stdlib"])
    first = next(iter(found))
    assert isinstance(first, str)
    assert found.total_bytes > 5_000_000


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl:3 is not JSON"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1 is a list, not an object"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"a\.jsonl:1 has no field 'text'; it has: body, id"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: field 'text' is NoneType, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: field 'text' is not Unicode text"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1 is not UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(jsonl(TEXTS), mtime=0)[:-12], r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.zst", zstandard.compress(jsonl(TEXTS))[:-5], r"a\.jsonl\.zst cannot be read"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz cannot be read"),
        ("a.txt", b"\xff\xfe", r"a\.txt is not UTF-8 text \(byte 0"),
        ("a.txt", b"", r"no documents in .*a\.txt \(1 empty texts\)"),
    ],
)
def test_bad_input_is_named(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(UserError, match=message):
        list(read_documents([path]))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", jsonl(["x", "y" * 100]), r"a\.jsonl:2 is longer than 60 bytes.* cut it into several documents"),
        ("a.jsonl.gz", gzip.compress(jsonl(["x", "y" * 100]), mtime=0), r"a\.jsonl\.gz:2 is longer than 60 bytes"),
        ("a.txt", b"y" * 61, r"a\.txt is longer than 60 bytes"),
    ],
)
def test_what_does_not_fit_into_memory_is_named(tmp_path, monkeypatch, name, data, message):
    monkeypatch.setattr("mosaic_dist.data.readers.LONGEST_BYTES", 60)
    path = write(tmp_path / name, data)
    with pytest.raises(UserError, match=message):
        list(read_documents([path]))
    write(
        tmp_path / name,
        b"y" * 60 if name == "a.txt" else jsonl(["x"]) if name == "a.jsonl" else gzip.compress(b"", mtime=0),
    )
    if name != "a.jsonl.gz":
        assert len(list(read_documents([path]))) == 1


def test_missing_input(tmp_path):
    with pytest.raises(UserError, match=r"input .*nowhere' does not exist"):
        read_documents([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"input .*\*\.txt' does not exist"):
        read_documents([str(tmp_path / "*.txt")])
    with pytest.raises(UserError, match="no files in"):
        read_documents([str(tmp_path)])


def test_hugging_face_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "train.parquet")
    assert list(hugging_face_documents(str(tmp_path))) == TEXTS
    with pytest.raises(UserError, match="row 0 has no field 'body'; it has: text"):
        list(hugging_face_documents(str(tmp_path), field="body"))
    with pytest.raises(UserError, match="split 'nosuch'"):
        list(hugging_face_documents(str(tmp_path), split="nosuch"))


def test_command_line_inputs(tmp_path):
    a, b = write(tmp_path / "a.txt", b"a"), write(tmp_path / "b,c.txt", b"b")
    assert list(choose_documents(f"{a},{a}", [b], None, "train", "text")) == ["a", "b"]
    assert list(choose_documents(b, [], None, "train", "text")) == ["b"]
    for inputs, dataset in ((None, None), (a, "name")):
        with pytest.raises(UserError, match="either with --input"):
            choose_documents(inputs, [], dataset, "train", "text")
