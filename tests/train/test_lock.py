"""Whose a run folder is while a process trains in it."""

import fcntl

import pytest

from mosaic_dist.errors import UserError
from mosaic_dist.train import session
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.lock import FolderInUse
from tests.train.expert_run import run


def claim(monkeypatch: pytest.MonkeyPatch, path, job: str | None, restarts: int) -> tuple[RunFolder, object]:
    """Claim a folder as a start of a SLURM job would."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    folder = RunFolder(path)
    return folder, folder.claim(run)


def test_only_an_earlier_start_of_the_same_job_is_waited_for(tmp_path, monkeypatch):
    first, holder = claim(monkeypatch, tmp_path, "7", 1)
    assert holder is None
    for job, restarts in ((None, 2), ("8", 2), ("7", 1), ("7", 0)):
        with pytest.raises(UserError, match=r"in use by another process .* start 2 of SLURM job 7") as refused:
            claim(monkeypatch, tmp_path, job, restarts)
        assert refused.value.exit_code == 2
    second, holder = claim(monkeypatch, tmp_path, "7", 2)
    assert str(holder).endswith(", start 2 of SLURM job 7")
    first.lock._file.close()  # what the end of its process does
    assert second.claim(run) is None
    with open(tmp_path / ".lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_wait_for_an_earlier_start_ends(tmp_path, monkeypatch):
    """With an exit code that lets SLURM start the job again, which that of other refusals does not."""
    first, _ = claim(monkeypatch, tmp_path, "7", 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    now = iter(range(0, 100_000, 500))
    said: list[str] = []
    monkeypatch.setattr(session, "on_main", lambda world, action: action())
    monkeypatch.setattr(session, "gather_problems", lambda problem: [] if problem is None else [problem])
    monkeypatch.setattr(session, "say", lambda world, text: said.append(text))
    monkeypatch.setattr(session.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(session.time, "sleep", lambda seconds: None)

    class Signals:
        received = None

    with pytest.raises(FolderInUse, match="still in use by process") as ended:
        session.claim(RunFolder(tmp_path), run, Signals(), None)
    assert ended.value.exit_code == 1
    assert len(said) == 1
    assert next(now) > run.parallel.step_limit_seconds
    assert first.lock._file is not None
