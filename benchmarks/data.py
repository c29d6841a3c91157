"""Data: preparation beside the bare tokenizer.

`python -m benchmarks.data` makes a JSONL file (lines of the standard library's sources, drawn at random into documents)
and turns it into tokens in several ways, each on `--workers` cores, in turns, so that all see the same machine:

prepare             ours, whole: read and parse the file, tokenise, pack, write shards, sync, publish
encode_batch        bare `tokenizers` on text in memory, with as many threads; the result is thrown away
encode_batch_fast   the same without offsets
processes           `encode_batch_fast` in as many forked processes, each with its share of the text in memory

The last three do less than any preparation can: no reading, no sending, no token leaves the library. Imports are left
out. The figures are the best over the rounds; CPU seconds are summed over processes, and tell more where others use the
same cores. Memory is the highest resident size of a process: of `prepare`, 700 MB are streaming's imports (torch), and
of the bare contenders, the text is a part.
"""

import json
import multiprocessing
import os
import platform
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import tokenizers

from mosaic_dist.cli import run_command
from mosaic_dist.data import mds
from mosaic_dist.data.encode import BATCH_BYTES
from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.sources import read_documents
from mosaic_dist.data.tokenizer import Tokenizer, train_bpe
from mosaic_dist.files import write_atomic

OURS = "prepare"
POLL_SECONDS = 0.2


def write_corpus(path: Path, megabytes: float, seed: int = 0) -> None:
    """Documents of 5 to 500 lines, one per row of a JSONL file."""
    lines = [line for text in read_documents(["stdlib"]) for line in text.splitlines()]
    generator = random.Random(seed)
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            text = "\n".join(generator.choices(lines, k=round(5 * 100 ** generator.random())))
            size += file.write(json.dumps({"text": text}) + "\n")


def text_batches(path: Path) -> list[list[str]]:
    """The documents in groups of about BATCH_BYTES."""
    groups: list[list[str]] = [[]]
    size = 0
    for text in read_documents([str(path)]):
        if size > BATCH_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(text)
        size += len(text)
    return groups


def ours(path: Path, content: str, workers: int) -> Callable[[], int]:
    """The whole preparation."""
    mds.open_writer(str(path.with_name("imports")), "uint16", 1, None, None)  # takes seconds that are not told

    def work() -> int:
        output = path.with_name("set")
        info = prepare(read_documents([str(path)]), Tokenizer(content), output, 2048, workers=workers, overwrite=True)
        return sum(source["tokens"] for source in info.sources)

    return work


def encode_all(content: str, groups: list[list[str]], method: str) -> int:
    """Tokens of all texts by the bare library."""
    inner = tokenizers.Tokenizer.from_str(content)
    encode = getattr(inner, method)
    return sum(len(found) for texts in groups for found in encode(texts, add_special_tokens=False))


def bare_threads(path: Path, content: str, workers: int, method: str) -> Callable[[], int]:
    """The bare library with threads (their number is in the environment)."""
    groups = text_batches(path)
    return lambda: encode_all(content, groups, method)


def bare_processes(path: Path, content: str, workers: int) -> Callable[[], int]:
    """The bare library in forked processes with one thread each."""
    groups = text_batches(path)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def work() -> int:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            shares = [(content, groups[i::workers], "encode_batch_fast") for i in range(workers)]
            return sum(pool.starmap(encode_all, shares, chunksize=1))

    return work


CONTENDERS: dict[str, Callable[[Path, str, int], Callable[[], int]]] = {
    OURS: ours,
    "encode_batch": partial(bare_threads, method="encode_batch"),
    "encode_batch_fast": partial(bare_threads, method="encode_batch_fast"),
    "processes": bare_processes,
}


def family(process: int) -> Iterator[int]:
    """A process and those that it started, and theirs."""
    yield process
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == process:
            yield from family(int(status.parent.name))


class Usage:
    """CPU seconds and highest resident size (MB) of this process and of all that it starts, watched by a thread."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self.peaks: dict[int, float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Usage":
        self._start = time.process_time()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self.seconds[os.getpid()] = time.process_time() - self._start

    def _watch(self) -> None:
        while not self._end.wait(POLL_SECONDS):
            for process in family(os.getpid()):
                try:
                    times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
                    status = Path(f"/proc/{process}/status").read_text()
                except OSError:
                    continue
                self.seconds[process] = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
                if (at := status.find("VmHWM:")) >= 0:
                    self.peaks[process] = int(status[at:].split()[1]) / 1e3

    def main_peak(self) -> float:
        """Of this process."""
        return self.peaks[os.getpid()]

    def worker_peak(self) -> float:
        """Of the largest other one."""
        return max((peak for process, peak in self.peaks.items() if process != os.getpid()), default=0.0)


def measure(name: str, path: Path, content: str, workers: int) -> tuple[float, float, float, float]:
    """Tokens per second, tokens per CPU second, and the memory of the main process and of the largest worker."""
    work = CONTENDERS[name](path, content, workers)
    begin = time.perf_counter()
    with Usage() as usage:
        tokens = work()
    seconds = time.perf_counter() - begin
    return tokens / seconds, tokens / sum(usage.seconds.values()), usage.main_peak(), usage.worker_peak()


def preparation(folder: Path, megabytes: float, vocab_size: int, rounds: int, workers: int) -> list[str]:
    """Rows of the table of the preparation."""
    path = folder / "corpus.jsonl"
    write_corpus(path, megabytes)
    content = train_bpe(read_documents(["stdlib"]), vocab_size).to_json()
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, figures in found.items():  # each in a fresh process, so that memory is its own
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                figures.append(pool.submit(measure, name, path, content, workers).result())
            print(name, *(f"{figure:,.0f}" for figure in figures[-1]), flush=True)
    best = {name: [max(column) for column in zip(*figures, strict=True)] for name, figures in found.items()}
    rows = [
        "| contender | tokens/s | ours / it | tokens / CPU s | ours / it | MB main | MB worker |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, (speed, thrift, main, worker) in best.items():
        speeds = f"{speed:,.0f} | {best[OURS][0] / speed:.0%} | {thrift:,.0f} | {best[OURS][1] / thrift:.0%}"
        rows.append(f"| {name} | {speeds} | {main:,.0f} | {worker:,.0f} |")
    return rows


def run(
    *,
    megabytes: float = 100.0,
    vocab_size: int = 32_000,
    rounds: int = 3,
    workers: int = 2,
    folder: str | None = None,
    output: str | None = None,
) -> None:
    """Print the tables, and write them with the command and the machine to --output; --folder holds the data."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        rows = preparation(Path(place), megabytes, vocab_size, rounds, workers)
    head = (
        f"# Data\n\n`python -m benchmarks.data --megabytes {megabytes:g} --rounds {rounds} --workers {workers}` at "
        f"commit {commit}, tokenizers {tokenizers.__version__}, vocabulary {vocab_size}, {platform.machine()} with "
        f"{os.cpu_count()} cores.\n\n"
    )
    text = head + "\n".join(rows) + "\n"
    print(text)
    if output is not None:
        write_atomic(output, text)


if __name__ == "__main__":
    run_command(run, "python -m benchmarks.data")
