"""Whole checkpoints pass, and whatever is wrong with bytes or manifest is told with the file's name."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mosaic_dist.checkpoint.audit import Check, checks_of, run_checks
from mosaic_dist.checkpoint.manifest import read_manifest, render_manifest
from mosaic_dist.errors import UserError
from tests.checkpoint.samples import save_small


def test_every_byte_of_a_whole_checkpoint_is_read(folder: Path) -> None:
    path = folder / "good" / "step_00000100"
    checks = checks_of(path)
    data = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert sum(check.size_bytes for check in checks) == data
    assert run_checks(checks, 2) == {path: []}


def test_every_damaged_file_is_named(folder: Path, tmp_path: Path) -> None:
    whole, broken = save_small(tmp_path, 1), save_small(tmp_path, 2)
    file = broken / "rank_00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = run_checks([*checks_of(whole), *checks_of(broken)], 3)
    assert found[whole] == []
    assert len(found[broken]) == 1
    assert f"{file} is damaged" in found[broken][0]
    file.write_bytes(content[:-1])
    assert "bytes, and" in run_checks(checks_of(broken), 1)[broken][0]


def _first_blocks(manifest: dict[str, Any]) -> list[list[Any]]:
    return manifest["tensors"]["experts.up.weight"]["kinds"]["master"]["blocks"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: _first_blocks(m).pop(0), "come from no rank"),
        (lambda m: _first_blocks(m).append(_first_blocks(m)[0]), "come from rank 0 and from rank 0"),
        (lambda m: m["tensors"]["scale"]["kinds"].clear(), "'scale' has a shape, (), but no piece"),
        (lambda m: _first_blocks(m)[0].__setitem__(3, _first_blocks(m)[0][3] + 4), "a block starts at byte"),
        (lambda m: m["rank_state"][0].clear(), "and what is before it ends at"),
        (lambda m: m["files"][0].__setitem__("bytes", 7), "bytes, and 7 were written"),
        (lambda m: m["rank_state"].append({}), "was written by 1 ranks"),
        (lambda m: m.update(step=7), "holds step 7"),
    ],
)
def test_a_manifest_with_a_right_checksum_must_still_be_complete(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    """As a wrong program would write it: the checksum is of what it says."""
    path = save_small(tmp_path, 1)
    manifest = copy.deepcopy(read_manifest(path))
    change(manifest)
    (path / "manifest.json").write_bytes(render_manifest(manifest))
    (told,) = run_checks(checks_of(path), 1)[path]
    assert says in told


def test_threads_work_side_by_side(tmp_path: Path) -> None:
    """Two checks that wait for each other come to an end only if both run at once."""
    meeting = threading.Barrier(2, timeout=20)
    assert run_checks([Check(tmp_path, 1, lambda: meeting.wait() and None) for _ in range(2)], 2) == {tmp_path: []}


def test_an_error_of_ours_is_no_finding(tmp_path: Path) -> None:
    def wrong() -> None:
        raise KeyError("a bug")

    def problem() -> None:
        raise UserError("damaged")

    assert run_checks([Check(tmp_path, 1, problem)], 1) == {tmp_path: ["damaged"]}
    with pytest.raises(KeyError, match="a bug"):
        run_checks([Check(tmp_path, 1, wrong)], 1)
