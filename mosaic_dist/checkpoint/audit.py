"""Checks of whole folders: every byte of every file, by several threads, and what the manifest says of them."""

import functools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mosaic_dist.checkpoint.folder import final_path
from mosaic_dist.checkpoint.manifest import rank_file_name
from mosaic_dist.checkpoint.rank_file import DTYPES, read_bytes
from mosaic_dist.checkpoint.reader import Checkpoint
from mosaic_dist.checkpoint.tensor_shards import CheckpointError, TensorSlice, check_tiling
from mosaic_dist.errors import UserError


class Check(NamedTuple):
    """A piece of work of `run_checks`: `prove` reads `size_bytes` of the folder `of`, and raises what is wrong."""

    of: Path
    size_bytes: int
    prove: Callable[[], None]


def run_checks(checks: Iterable[Check], threads: int) -> dict[Path, list[str]]:
    """Run all checks, with a progress bar in bytes; what is wrong with each folder, in no order. Only UserErrors count.

    Hashing and reading release the interpreter's lock, so threads do go side by side; a file is one thread's.
    """
    checks = list(checks)
    problems: dict[Path, list[str]] = {check.of: [] for check in checks}
    total_bytes = sum(check.size_bytes for check in checks)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total_bytes, unit="B", unit_scale=True, desc="verifying", disable=None) as bar,
    ):
        running = {pool.submit(check.prove): check for check in checks}
        for done in as_completed(running):
            check = running[done]
            try:
                done.result()
            except UserError as error:
                problems[check.of].append(str(error))
            bar.update(check.size_bytes)
    return problems


def checks_of(directory: Path) -> list[Check]:
    """Checks of one checkpoint: its manifest first, which says what else there is to check."""
    try:
        checkpoint = Checkpoint.open(directory)
    except CheckpointError as error:
        return [failed(directory, str(error))]
    data = [
        Check(directory, file["bytes"], functools.partial(checkpoint.verify_file, index))
        for index, file in enumerate(checkpoint.manifest["files"])
    ]
    return [Check(directory, 0, functools.partial(check_structure, checkpoint)), *data]


def failed(of: Path, problem: str) -> Check:
    """A check that is over: what is wrong is known."""

    def tell() -> None:
        raise CheckpointError(problem)

    return Check(of, 0, tell)


def check_structure(checkpoint: Checkpoint) -> None:
    """Check that a manifest is complete: every element of every tensor is in one block, and every byte in one place.

    Raises CheckpointError. Says nothing of the bytes themselves.
    """
    manifest, where = checkpoint.manifest, checkpoint.directory
    if where.name.startswith("step_") and where.name != final_path(where.parent, checkpoint.step).name:
        raise CheckpointError(f"{where} holds step {checkpoint.step}; give the folder its own name")
    counts = {key: len(manifest[key]) for key in ("files", "rank_state")}
    if set(counts.values()) != {checkpoint.world_size}:
        raise CheckpointError(f"{where} was written by {checkpoint.world_size} ranks, and has {counts}")
    places: dict[int, list[tuple[int, int]]] = {rank: [] for rank in range(checkpoint.world_size)}
    intervals = []
    for name, tensor in manifest["tensors"].items():
        for kind, stored in tensor["kinds"].items():
            width = DTYPES[stored["dtype"]].itemsize
            # an empty piece keeps a tensor without elements, which has no block, from being a hole
            intervals.append(TensorSlice(name, kind, 0, 0, stored["dtype"], 0))
            for start, stop, rank, offset_bytes, _ in stored["blocks"]:
                intervals.append(TensorSlice(name, kind, start, stop, stored["dtype"], rank))
                places[rank].append((offset_bytes, offset_bytes + (stop - start) * width))
    for rank, kept in enumerate(manifest["rank_state"]):
        for row in kept.values():
            size_bytes = math.prod(row["shape"]) * DTYPES[row["dtype"]].itemsize
            places[rank].append((row["offset_bytes"], row["offset_bytes"] + size_bytes))
    try:
        check_tiling(intervals, checkpoint.shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    for rank, file in enumerate(manifest["files"]):
        _check_places(where / rank_file_name(rank), places[rank], file["bytes"])


def _check_places(path: Path, places: list[tuple[int, int]], size_bytes: int) -> None:
    """Header and tensors must follow each other without gap or overlap to the end of a file."""
    start = bytearray(8)
    read_bytes(path, 0, memoryview(start))
    reached = 8 + int.from_bytes(start, "little")
    for low, high in sorted(places):
        if low != reached:
            raise CheckpointError(f"{path}: a block starts at byte {low}, and what is before it ends at {reached}")
        reached = high
    if reached != size_bytes:
        raise CheckpointError(f"{path}: its blocks end at byte {reached}, and it has {size_bytes}")
