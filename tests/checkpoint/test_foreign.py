"""Checkpoints of other formats are told for what they are, and nothing in them is opened."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from t4_moe import run

from mosaic_dist.checkpoint import CheckpointError, candidates, newest
from mosaic_dist.checkpoint.foreign import refuse_foreign
from mosaic_dist.convert.facts import describe
from mosaic_dist.convert.hugging_face import import_folder
from mosaic_dist.convert.locate import choose_checkpoint, locate
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.initial import open_initial
from tests.checkpoint.samples import save_small
from tests.checkpoint.test_damage import Trap

LAYOUTS = {
    "ZeRO stage 1 or 2 of 2 ranks": [
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ],
    "ZeRO stage 3 of 1 ranks": [
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ],
    "3 experts a layer": [
        "mp_rank_00_model_states.pt",
        "expp_rank_0_mp_rank_00_optim_states.pt",
        *(f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt" for layer in (0, 1) for expert in (0, 1, 2)),
    ],
    "universal checkpoint of DeepSpeed": ["zero/embedding.weight/fp32.pt", "mp_rank.pt"],
    "torch.distributed.checkpoint": [".metadata", "__0_0.distcp"],
}


def write(root: Path, names: list[str]) -> Path:
    """DeepSpeed's folder: `latest`, and a folder named by it whose files are traps."""
    (root / "global_step40").mkdir(parents=True)
    (root / "latest").write_text("global_step40")
    for name in names:
        file = root / "global_step40" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(Trap(root / "sprung")))
    return root


@pytest.mark.parametrize("told", LAYOUTS)
def test_each_way_in_says_what_it_is_and_runs_nothing(tmp_path: Path, told: str) -> None:
    root = write(tmp_path / "theirs", LAYOUTS[told])
    ways = (
        refuse_foreign,
        candidates,
        newest,
        lambda path: describe(locate(path)),
        lambda path: choose_checkpoint(str(path), None, None),
        lambda path: choose_checkpoint(None, str(path), None),
        import_folder,
        lambda path: RunFolder(path).claim(run),
        lambda path: open_initial(replace(run, init_from=str(path)), None, Path("nowhere")),
    )
    for way in ways:
        for path in (root, root / "global_step40"):
            with pytest.raises(CheckpointError, match=r"global_step40 is a .*python -m mosaic_dist import") as caught:
                way(path)
            assert told in str(caught.value)
    assert not (root / "sprung").exists()
    (file,) = {root / "global_step40" / LAYOUTS[told][-1]}
    pickle.loads(file.read_bytes())
    assert (root / "sprung").exists(), "the trap does not work"


def test_ours_beside_theirs_is_found(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS["ZeRO stage 3 of 1 ranks"])
    save_small(tmp_path, 3)
    assert list(candidates(tmp_path)) == [3]


def test_other_folders_are_not_theirs(tmp_path: Path) -> None:
    refuse_foreign(tmp_path)
    refuse_foreign(tmp_path / "missing")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "model.pt").write_bytes(b"")
    refuse_foreign(tmp_path)
    assert candidates(tmp_path) == {}
