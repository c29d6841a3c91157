"""Whose a run folder is: what may lie in it before its first start has told."""

import pytest

from mosaic_dist.errors import UserError
from mosaic_dist.train.folder import RunFolder
from tests.train.expert_run import run


def test_a_start_that_ended_before_it_told_is_no_obstacle(tmp_path):
    folder = RunFolder(tmp_path / "run")
    (folder.path / "slurm" / "7.1").mkdir(parents=True)
    (folder.path / ".doctor").mkdir()
    folder.claim(run)
    folder.lock._file.close()
    (folder.path / ".run.yaml.123.tmp").write_text("na")
    RunFolder(folder.path).claim(run)


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/step_00000004/manifest.json", "slurm.txt"])
def test_other_files_are(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"is not empty and holds no run\.yaml"):
        RunFolder(tmp_path).claim(run)


def test_one_process_at_a_time(tmp_path):
    first = RunFolder(tmp_path)
    first.claim(run)
    with pytest.raises(UserError, match="in use by another process"):
        RunFolder(tmp_path).claim(run)
