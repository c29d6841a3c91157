import shutil
import warnings
from pathlib import Path

import pytest

from mosaic_dist.checkpoint import Checkpoint, CheckpointError, CheckpointPolicy, candidates, newest, prune, steps
from mosaic_dist.spec import SpecError
from tests.checkpoint.samples import random_tensors, same_bits, save_small


def content_seed(checkpoint: Checkpoint | None) -> int:
    """Which seed's values a checkpoint holds."""
    assert checkpoint is not None
    values = checkpoint.read_full("norm.weight", "master")
    return next(seed for seed in range(10) if same_bits(values, random_tensors(seed)["norm.weight", "master"]))


def test_nothing_yet(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        assert steps(root) == []
        assert newest(root) is None
        assert prune(root, 1) == []


def test_newest_passes_over_a_broken_one_with_a_warning(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_small(tmp_path, step)
    (tmp_path / "step_00000004" / "manifest.json").unlink()
    (tmp_path / "step_00000003" / "rank_00000.safetensors").write_bytes(b"torn")
    with pytest.warns(RuntimeWarning, match=r"using .*step_00000002.*step_00000004.*manifest.*step_00000003.*damaged"):
        found = newest(tmp_path)
    assert content_seed(found) == 2
    assert steps(tmp_path) == [1, 2]


def test_a_broken_older_one_is_no_matter(tmp_path: Path) -> None:
    save_small(tmp_path, 1)
    save_small(tmp_path, 2)
    (tmp_path / "step_00000001" / "manifest.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert content_seed(newest(tmp_path)) == 2


def test_all_broken_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        (save_small(tmp_path, step) / "manifest.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*step_00000002.*step_00000001"):
        newest(tmp_path)
    assert prune(tmp_path, 1) == []
    assert steps(tmp_path) == []
    assert candidates(tmp_path) == {step: tmp_path / f"step_{step:08d}" for step in (1, 2)}


def test_a_folder_under_the_name_of_another_step_is_broken(tmp_path: Path) -> None:
    save_small(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000002")
    with pytest.warns(RuntimeWarning, match="step_00000002 holds step 1"):
        assert content_seed(newest(tmp_path)) == 1


def test_leftovers_of_a_crash_are_ignored_and_swept(tmp_path: Path) -> None:
    save_small(tmp_path, 1)
    for name in (".step_00000002.tmp", ".step_00000001.deleting", "..step_00000001.retired.deleting"):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / name)
    (tmp_path / "notes").mkdir()
    assert steps(tmp_path) == [1]
    save_small(tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "step_00000001", "step_00000003"}


def test_a_retired_checkpoint_counts_until_its_name_is_taken(tmp_path: Path) -> None:
    (save_small(tmp_path, 5)).rename(tmp_path / ".step_00000005.retired")
    assert steps(tmp_path) == [5]
    assert candidates(tmp_path) == {5: tmp_path / ".step_00000005.retired"}
    assert content_seed(newest(tmp_path)) == 5
    save_small(tmp_path, 6)
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000005", "step_00000006"}
    shutil.copytree(tmp_path / "step_00000005", tmp_path / ".step_00000005.retired")
    save_small(tmp_path, 7)
    assert steps(tmp_path) == [5, 6, 7]
    assert not (tmp_path / ".step_00000005.retired").exists()


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    save_small(tmp_path, 1, seed=1)
    save_small(tmp_path, 1, seed=2)
    assert content_seed(newest(tmp_path)) == 2
    (tmp_path / "step_00000001" / "manifest.json").unlink()
    save_small(tmp_path, 1, seed=3)
    assert content_seed(newest(tmp_path)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_prune_counts_whole_ones(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_small(tmp_path, step)
    for step in (2, 4, 6):
        (tmp_path / f"step_{step:08d}" / "manifest.json").unlink()
    assert prune(tmp_path, 2) == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {f"step_{step:08d}" for step in (3, 4, 5, 6)}
    assert prune(tmp_path, 2) == []
    assert prune(tmp_path, 1) == [3, 4]
    assert steps(tmp_path) == [5]
    with pytest.raises(ValueError, match=r"keep_last \(0\)"):
        prune(tmp_path, 0)


@pytest.mark.parametrize(
    ("keep_every", "protected", "left"),
    [(0, set(), {8, 9}), (3, set(), {3, 6, 7, 8, 9}), (3, {2}, {2, 3, 6, 7, 8, 9}), (4, {9}, {4, 6, 7, 8, 9})],
)
def test_multiples_stay_for_ever_and_do_not_count(tmp_path: Path, keep_every: int, protected: set, left: set) -> None:
    for step in range(1, 10):
        save_small(tmp_path, step)
        prune(tmp_path, 2, protected, keep_every)
    assert set(steps(tmp_path)) == left


def test_nothing_goes_where_all_are_multiples(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_small(tmp_path, step)
    assert prune(tmp_path, 1, (), 10) == []
    assert steps(tmp_path) == [10, 20, 30]


def test_policy() -> None:
    kept = {"every_steps": 500, "keep_last": 2, "keep_best": 0, "keep_every": 0}
    assert CheckpointPolicy().to_dict().items() >= kept.items()
    with pytest.raises(SpecError, match="keep_last"):
        CheckpointPolicy(keep_last=0)
