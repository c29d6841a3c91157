"""What may be written where: regular files and new folders, never in the place of something else."""

import os
import stat
from pathlib import Path

import pytest

from mosaic_dist.convert import write_model
from mosaic_dist.convert.hugging_face import export_folder
from mosaic_dist.data.publish import new_dataset
from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.command import evaluate
from mosaic_dist.figure import publish, pyplot
from mosaic_dist.files import write_atomic
from mosaic_dist.plan.calibrate import calibrate
from mosaic_dist.train.folder import RunFolder
from tests.train.expert_run import run


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    """Another /dev/full."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize("make", [make_pipe, make_device, Path.mkdir])
@pytest.mark.parametrize("behind_link", [False, True])
def test_what_is_not_a_regular_file_is_not_replaced(tmp_path, make, behind_link):
    there = output = tmp_path / "there"
    make(there)
    if behind_link:
        output = tmp_path / "link"
        output.symlink_to(there)
    before = os.lstat(there)
    figure = pyplot.figure()
    for write in (
        lambda: write_atomic(output, "text"),
        lambda: publish(figure, output),
        lambda: evaluate(model="nothing", task="perplexity", data="stdlib", json_output=str(output)),
    ):
        with pytest.raises(UserError, match=rf"{output.name} is a .* and is not replaced"):
            write()
    pyplot.close(figure)
    assert os.path.samestat(os.lstat(there), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"there", output.name})


@pytest.mark.parametrize("make", [make_pipe, make_device, Path.touch])
def test_a_folder_cannot_take_the_place_of_something_else_or_lie_in_it(tmp_path, make):
    there = tmp_path / "there"
    make(there)
    before = os.lstat(there)
    for output in (there, there / "below"):
        for write in (
            lambda output=output: write_model(output, run.model, (), {}, None),
            lambda output=output: export_folder(run.model, {}, output),
            lambda output=output: RunFolder(output).claim(run),
        ):
            with pytest.raises(UserError, match=r"there is not a directory, so nothing is written to .*choose another"):
                write()
    for write in (
        lambda: write_atomic(there / "file", ""),
        lambda: calibrate(there / "file"),
        lambda: new_dataset(there / "data", overwrite=True).__enter__(),
    ):
        with pytest.raises(UserError, match="there is not a directory, so nothing is written to"):
            write()
    assert os.path.samestat(os.lstat(there), before)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_link_stays_and_its_file_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    for text in ("new", "newer"):
        write_atomic(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "elsewhere" / "file").read_text() == text
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["file"]
