import filecmp
import random
import time
from pathlib import Path

import pytest

from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.tokenizer import Tokenizer, train_bpe

SEQ_LEN = 16


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Short texts of words and odd characters, some with text that looks like a special token."""
    words = ["alpha", "beta", "naïve", "日本語", "<|eos|>", "def f(x):\n\treturn x", "🙂", "\r\n", "  ", "\x00\x07"]
    generator = random.Random(seed)
    return [f"{i} " + " ".join(generator.choices(words, k=generator.randint(1, 30))) for i in range(count)]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(300)


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> Tokenizer:
    return train_bpe(documents, 300)


@pytest.fixture(scope="session")
def dataset(documents: list[str], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    """A dataset of several small shards in both splits."""
    output = tmp_path_factory.mktemp("data") / "set"
    return prepare(
        documents, tokenizer, output, SEQ_LEN, validation_fraction=0.2, workers=1, shard_bytes=SEQ_LEN * 2 * 50
    )


def same_files(a: Path, b: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names = sorted(str(path.relative_to(a)) for path in a.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(b)) for path in b.rglob("*") if path.is_file())
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


@pytest.fixture(scope="session")
def other(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    """Another dataset of the same tokenizer, of about a third of the size."""
    output = tmp_path_factory.mktemp("data") / "other"
    return prepare(
        make_documents(100, seed=1), tokenizer, output, SEQ_LEN, validation_fraction=0.2, workers=1,
        shard_bytes=SEQ_LEN * 2 * 50,
    )  # fmt: skip


def children(process: int) -> list[int]:
    """Processes that a process started, and theirs."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            found += [int(status.parent.name), *children(int(status.parent.name))]
    return found


def assert_gone(processes: list[int], seconds: float = 15) -> None:
    """Wait for processes to end; one that is dead and waits for its parent to read its status counts as ended."""
    deadline = time.monotonic() + seconds
    while (alive := [p for p in processes if Path("/proc", str(p), "exe").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive, f"processes {alive} outlive the kill by {seconds} s"
