"""Saving: every rank writes one file, and the checkpoint appears under its name only when all of it is proven whole.

    root/.step_00000100.tmp/   while it is written; swept away by the next save after a crash
    root/step_00000100/        manifest.json, rank_00000.safetensors, ...

The steps of a save are four, and after each the ranks exchange how it went, so that an error on one is the same error
on all and nobody waits for a rank that gave up:

    1. tell which intervals each rank holds     2. check them, make the folder (rank 0)
    3. write and fsync the data files           4. write the manifest, sync, rename (rank 0)
"""

import datetime
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mosaic_dist import __version__
from mosaic_dist.checkpoint.folder import final_path, retired_path, sweep, temporary_path
from mosaic_dist.checkpoint.manifest import (
    FORMAT,
    MANIFEST_NAME,
    check_plain,
    rank_file_name,
    refuse_unknown_format,
    render_manifest,
)
from mosaic_dist.checkpoint.rank_file import DTYPE_NAMES, write_tensors
from mosaic_dist.checkpoint.tensor_shards import CheckpointError, TensorShard, TensorSlice, check_tiling, merge_shapes
from mosaic_dist.files import publish_directory, remove_directory, write_atomic

# The unit of checksums. Someone who wants a part of a block has to read all of it once, so it is small beside a
# rank's share, and large beside the 200 bytes that each block takes in the manifest.
BLOCK_BYTES = 64 << 20
RANK_STATE = "rank_state"

T = TypeVar("T")


class State(NamedTuple):
    """What a rank hands over to `save`, which tells more."""

    pieces: Sequence[TensorShard]
    shapes: Mapping[str, tuple[int, ...]]
    state: Mapping[str, Any]
    rank_state: Mapping[str, Tensor]


class _Plan(NamedTuple):
    """What a rank is going to write."""

    intervals: list[TensorSlice]
    shapes: dict[str, tuple[int, ...]]


class _Share(NamedTuple):
    """What a rank has written: rows of the manifest."""

    file: dict[str, Any]
    blocks: list[tuple[str, str, list[Any]]]
    rank_state: dict[str, dict[str, Any]]


def save(
    root: str | Path,
    step: int,
    pieces: Sequence[TensorShard],
    shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Any],
    rank_state: Mapping[str, Tensor],
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `root/step_<step>`, all or nothing, and return its path. Collective: every rank of `group` calls it.

    `group=None` is the default group, or this process alone where torch.distributed is not initialised. Together the
    ranks' `pieces` must hold every element of every tensor in `shapes` exactly once per kind. `state` is plain JSON and
    the same everywhere: rank 0's is kept (tuples come back as lists). `rank_state` is kept for each rank: small tensors
    of any shape.

    A checkpoint of the same step is replaced, after the new one is whole: a run that falls back behind a damaged
    checkpoint passes its step again. A crash at any point leaves the old one or the new one. A checkpoint of another
    format is never replaced.

    Raises CheckpointError, with the same text on every rank, when any rank fails; older checkpoints are then untouched
    and the unfinished folder is gone. If a rank dies, the others get the error of their process group.
    """
    root = Path(root)
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    rank = 0 if group is None else dist.get_rank(group)
    aside, final = temporary_path(root, step), final_path(root, step)
    try:
        plans = _together(group, final, lambda: _plan(pieces, shapes, state, rank_state, rank))
        _together(group, final, lambda: _prepare(aside, final, plans) if rank == 0 else None)
        shares = _together(group, final, lambda: _write(aside, pieces, rank_state, rank))
        _together(group, final, lambda: _commit(aside, final, step, plans, shares, state) if rank == 0 else None)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def _together(group: dist.ProcessGroup | None, final: Path, work: Callable[[], T]) -> list[T]:
    """Run `work` and exchange the outcome; every rank gets all results, or raises the same error.

    Every rank reaches the exchange, whatever happened to it before.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    told = failure and (
        str(failure) if isinstance(failure, CheckpointError) else f"{type(failure).__name__}: {failure}"
    )
    outcomes: list[Any] = [(result, told)]
    if group is not None:
        outcomes = [None] * dist.get_world_size(group)
        dist.all_gather_object(outcomes, (result, told), group=group)
    failed = [f"rank {rank}: {told}" for rank, (_, told) in enumerate(outcomes) if told is not None]
    if failed:
        raise CheckpointError(f"{final} was not saved: {'; '.join(failed)}") from failure
    return [result for result, _ in outcomes]


# --- the four steps -----------------------------------------------------------------------------------------------


def _plan(
    pieces: Sequence[TensorShard],
    shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Any],
    rank_state: Mapping[str, Tensor],
    rank: int,
) -> _Plan:
    """Refuse what this rank alone can see to be wrong, and tell the rest to the others."""
    if rank == 0:
        check_plain(state, "state")
    for what, tensor in [(f"{p.kind} of {p.tensor!r}", p.data) for p in pieces] + [
        (f"{RANK_STATE} {name!r}", tensor) for name, tensor in rank_state.items()
    ]:
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{what} has dtype {tensor.dtype}; known: {', '.join(map(str, DTYPE_NAMES))}")
    for piece in pieces:
        if piece.data.dim() != 1 or piece.start < 0:
            place = f"a {piece.data.dim()}-D piece at {piece.start}"
            raise CheckpointError(f"{piece.kind} of {piece.tensor!r}: {place}; pieces are 1-D and start at 0 or later")
        if "/" in piece.kind or piece.kind == RANK_STATE:
            raise CheckpointError(f"{piece.kind!r} cannot be a kind: no '/' in it, and not {RANK_STATE!r}")
    intervals = [
        TensorSlice(p.tensor, p.kind, p.start, p.start + len(p.data), DTYPE_NAMES[p.data.dtype], rank) for p in pieces
    ]
    return _Plan(intervals, {name: tuple(shape) for name, shape in shapes.items()})


def _prepare(aside: Path, final: Path, plans: Sequence[_Plan]) -> None:
    """Check the whole before a byte is written, then make an empty folder for it."""
    refuse_unknown_format(final)
    check_tiling((interval for plan in plans for interval in plan.intervals), merge_shapes(p.shapes for p in plans))
    final.parent.mkdir(parents=True, exist_ok=True)
    sweep(final.parent)
    aside.mkdir()


def _write(aside: Path, pieces: Sequence[TensorShard], rank_state: Mapping[str, Tensor], rank: int) -> _Share:
    """Write this rank's file and describe it."""
    blocks = {f"{block.kind}/{block.tensor}/{block.start}": block for block in _blocks(pieces)}
    data = {key: block.data for key, block in blocks.items()}
    own = {f"{RANK_STATE}/{name}": tensor for name, tensor in rank_state.items()}
    name = rank_file_name(rank)
    written = write_tensors(aside / name, data | own)
    rows = []
    for key, block in blocks.items():
        place = written.places[key]
        stop = block.start + len(block.data)
        rows.append((block.tensor, block.kind, [block.start, stop, rank, place.offset_bytes, place.checksum]))
    kept = {
        name: {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "offset_bytes": written.places[f"{RANK_STATE}/{name}"].offset_bytes,
            "xxh3_128": written.places[f"{RANK_STATE}/{name}"].checksum,
        }
        for name, tensor in rank_state.items()
    }
    return _Share({"name": name, "bytes": written.size_bytes, "xxh3_128": written.checksum}, rows, kept)


def _blocks(pieces: Sequence[TensorShard]) -> Iterator[TensorShard]:
    """Cut pieces into blocks (views of them) of at most BLOCK_BYTES; empty pieces vanish."""
    for piece in pieces:
        length = max(1, BLOCK_BYTES // piece.data.element_size())
        for low in range(0, len(piece.data), length):
            yield piece._replace(start=piece.start + low, data=piece.data[low : low + length])


def _commit(
    aside: Path, final: Path, step: int, plans: Sequence[_Plan], shares: Sequence[_Share], state: Mapping[str, Any]
) -> None:
    """Write the manifest and give the folder its name; an older folder of that name goes only then."""
    for share in shares:
        size = (aside / share.file["name"]).stat().st_size  # also: is it the same folder that every rank wrote to?
        if size != share.file["bytes"]:
            raise CheckpointError(f"{share.file['name']} has {size} bytes after {share.file['bytes']} were written")
    write_atomic(aside / MANIFEST_NAME, render_manifest(_manifest(step, plans, shares, state)))
    retired = retired_path(final)
    if not final.exists():
        publish_directory(aside, final)
        return
    os.rename(final, retired)
    try:
        publish_directory(aside, final)
    except BaseException:
        if not final.exists():
            os.rename(retired, final)
        raise
    remove_directory(retired)


def _manifest(step: int, plans: Sequence[_Plan], shares: Sequence[_Share], state: Mapping[str, Any]) -> dict[str, Any]:
    tensors: dict[str, dict[str, Any]] = {}
    for name, shape in merge_shapes(plan.shapes for plan in plans).items():
        tensors[name] = {"shape": list(shape), "kinds": {}}
    for interval in (interval for plan in plans for interval in plan.intervals):
        tensors[interval.tensor]["kinds"].setdefault(interval.kind, {"dtype": interval.dtype, "blocks": []})
    for tensor, kind, row in sorted(row for share in shares for row in share.blocks):
        tensors[tensor]["kinds"][kind]["blocks"].append(row)
    return {
        "format": FORMAT,
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"torch": str(torch.__version__), "mosaic_dist": __version__},
        "world_size": len(shares),
        "state": state,
        "files": [share.file for share in shares],
        "tensors": tensors,
        "rank_state": [share.rank_state for share in shares],
    }
