"""A checkpoint that two ranks have written together."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.ranks import WORLD_SIZE
from tests.launch import check, run_ranks


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo ranks have left behind; one launch for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    check(run_ranks("tests.checkpoint.ranks", WORLD_SIZE, str(folder)))
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """What each rank wrote down, of the module's own `folder` where it has one."""
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(WORLD_SIZE)]
