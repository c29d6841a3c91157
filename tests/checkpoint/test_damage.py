"""Whatever happens to a file after it was written is told, and nothing in a file is ever executed."""

import collections
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mosaic_dist.checkpoint import Checkpoint, CheckpointError, newest, prune
from mosaic_dist.checkpoint.manifest import read_manifest, render_manifest
from mosaic_dist.checkpoint.tensor_shards import UnknownFormatError
from mosaic_dist.parallel import World
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.resuming import newest_good
from tests.checkpoint.samples import DTYPES, SHAPES, save_small
from tests.train.expert_run import run as expert_run

FLIPS = 120


def read_all(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    checkpoint.rank_state(0)
    for name in SHAPES:
        for kind in DTYPES:
            checkpoint.read_full(name, kind)


def flip(path: Path, position: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json"])
def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, name: str) -> None:
    directory = save_small(tmp_path, 1)
    path = directory / name
    size = path.stat().st_size
    header = 8 + int.from_bytes((directory / "rank_00000.safetensors").read_bytes()[:8], "little")
    chance = random.Random(0)
    for position in [0, 7, 8, 50, size - 1, *(chance.randrange(size) for _ in range(FLIPS))]:
        bit = chance.randrange(8)
        flip(path, position, bit)
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            Checkpoint.open(directory).verify()
        if name == "manifest.json" or position >= header:
            with pytest.raises(CheckpointError, match=f"{name} is damaged"):
                read_all(directory)
        flip(path, position, bit)
    Checkpoint.open(directory).verify()
    read_all(directory)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json"])
@pytest.mark.parametrize("change", ["truncate", "extend", "empty", "delete"])
def test_another_size_or_none_does_not_open(tmp_path: Path, name: str, change: str) -> None:
    directory = save_small(tmp_path, 1)
    content = (directory / name).read_bytes()
    if change == "delete":
        (directory / name).unlink()
    else:
        (directory / name).write_bytes({"truncate": content[:-1], "extend": content + b" ", "empty": b""}[change])
    with pytest.raises(CheckpointError, match=name):
        Checkpoint.open(directory)


def test_a_file_that_changes_after_opening_is_found(tmp_path: Path) -> None:
    directory = save_small(tmp_path, 1)
    path = directory / "rank_00000.safetensors"
    truncated, gone = Checkpoint.open(directory), Checkpoint.open(directory)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=r"of \d+ bytes are there"):
        [truncated.read_full(name, "master") for name in SHAPES]
    path.unlink()
    for act in (gone.verify, lambda: gone.read_full("scale", "master"), lambda: gone.rank_state(0)):
        with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors cannot be read: No such file"):
            act()


def test_a_data_file_of_another_step_is_found(tmp_path: Path) -> None:
    mine, other = save_small(tmp_path, 1), save_small(tmp_path, 2)
    content = (other / "rank_00000.safetensors").read_bytes()
    assert len(content) == (mine / "rank_00000.safetensors").stat().st_size
    (mine / "rank_00000.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_all(mine)


def test_a_manifest_of_a_later_format_is_refused(tmp_path: Path) -> None:
    directory = save_small(tmp_path, 1)
    manifest = read_manifest(directory) | {"format": 2}
    (directory / "manifest.json").write_bytes(render_manifest(manifest))
    with pytest.raises(CheckpointError, match="has format 2; this version reads format 1"):
        Checkpoint.open(directory)


@pytest.fixture
def alone() -> Iterator[World]:
    """A process group of this process, as a run without a launcher has it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def damages(file: Path, chance: random.Random) -> Iterator[str]:
    """Damage a file in one way after another, and name the way; whoever takes the next one mends it before."""
    size = file.stat().st_size
    for position in {0, 7, 8, 40, size - 1, *(chance.randrange(size) for _ in range(FLIPS))}:
        flip(file, position, chance.randrange(8))
        yield "bit flipped"
    content = file.read_bytes()
    for length in {0, 1, size // 2, size - 1, *(chance.randrange(size) for _ in range(20))}:
        file.write_bytes(content[:length])
        yield "truncated"
    file.write_bytes(content + b"\0")
    yield "extended"
    file.write_bytes(bytes(size))
    yield "zeroed"
    file.unlink()
    yield "missing"


@pytest.mark.parametrize("is_framed", [True, False])
def test_a_newer_format_is_neither_passed_over_nor_overwritten(alone: World, tmp_path: Path, is_framed: bool) -> None:
    """Also one whose manifest has another checksum than ours: only its format is known to be one of a later version."""
    run = RunFolder(tmp_path)
    save_small(run.checkpoints, 1)
    manifest = save_small(run.checkpoints, 2) / "manifest.json"
    later = render_manifest(read_manifest(manifest.parent) | {"format": 2})
    manifest.write_bytes(later if is_framed else later.replace(b"xxh3_128", b"blake3"))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for refuses in (
        lambda: newest_good(run, alone),
        lambda: run.claim(expert_run),
        lambda: newest(run.checkpoints),
        lambda: prune(run.checkpoints, 1),
    ):
        with pytest.raises(UnknownFormatError, match=r"step_00000002.manifest\.json has format 2; this version reads"):
            refuses()
    with pytest.raises(CheckpointError, match=r"step_00000002 was not saved: .* has format 2; this version reads"):
        save_small(run.checkpoints, 2)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_no_damage_to_any_file_gets_past_the_start_of_a_run(folder: Path, alone: World, tmp_path: Path) -> None:
    """Every file of a checkpoint of two ranks, manifest included: the run never goes on from what was not written."""
    run = RunFolder(tmp_path / "run")
    whole = folder / "good" / "step_00000100"
    damaged = run.checkpoints / whole.name
    shutil.copytree(whole, damaged)
    assert newest_good(run, alone) is not None
    tried, missed, chance = collections.Counter(), [], random.Random(1)
    files = sorted(path.name for path in whole.iterdir())
    assert len(files) == 3
    for name in files:
        for way in damages(damaged / name, chance):
            tried[way] += 1
            try:
                newest_good(run, alone)
                missed.append((name, way))
            except CheckpointError:
                pass
            shutil.copyfile(whole / name, damaged / name)
    print(f"{sum(tried.values())} damages in {len(files)} files, {len(missed)} missed: {dict(tried)}")
    assert missed == []
    assert tried["bit flipped"] > 300
    assert newest_good(run, alone) is not None


class Trap:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_a_pickle_in_place_of_a_data_file_is_refused_and_not_run(tmp_path: Path) -> None:
    directory, sprung = save_small(tmp_path, 1), tmp_path / "sprung"
    path = directory / "rank_00000.safetensors"
    size = path.stat().st_size
    content = pickle.dumps(Trap(sprung))
    torch.save(Trap(sprung), tmp_path / "trap.pt")
    for trap in (content, content.ljust(size, b"\0"), (tmp_path / "trap.pt").read_bytes().ljust(size, b"\0")):
        path.write_bytes(trap)
        with pytest.raises(CheckpointError, match="is damaged"):
            read_all(directory)
    (directory / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_all(directory)
    assert not sprung.exists()
    pickle.loads(content)
    assert sprung.exists()
