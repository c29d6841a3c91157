"""Processes import what they need and no more: a few packages take seconds, on every rank of every start."""

import subprocess
import sys

import pytest

from mosaic_dist.__main__ import COMMANDS
from tests.launch import ROOT, clean_environment

PICTURES_AND_TOOLS = {
    "matplotlib", "transformers", "datasets", "wandb", "pandas", "sklearn", "scipy", "streaming", "pyarrow",
    "tensorboard", "lm_eval", "IPython", "torchvision",
}  # fmt: skip
ENGINE = {"deepspeed", "triton"}
HEAVY = PICTURES_AND_TOOLS | ENGINE | {"torch", "numpy", "tokenizers", "safetensors"}


def imported(*statement: str) -> set[str]:
    """Top packages that a fresh Python has after a statement, which may end the process."""
    told = "import sys, atexit; atexit.register(lambda: print('imported', *sys.modules)); " + "; ".join(statement)
    environment = clean_environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'recipes'}"}
    done = subprocess.run([sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.rpartition("imported")[2].split()}


def as_command(*words: str) -> tuple[str, ...]:
    """`python -m mosaic_dist WORDS` as statements."""
    return f"sys.argv[1:] = {list(words)}", "import runpy; runpy.run_module('mosaic_dist', run_name='__main__')"


def test_the_list_of_commands_needs_nothing_heavy():
    found = imported(*as_command("--help"))
    assert "mosaic_dist" in found
    assert found & HEAVY == set()


@pytest.mark.parametrize("command", ["inspect", "verify", "export", "generate", "plot", "report", "compare"])
def test_commands_that_only_read_do_without_deepspeed(command):
    assert imported(*as_command(command, "--help")) & ENGINE == set()


def test_a_run_imports_no_pictures_and_no_tools():
    found = imported("import t4_moe")
    assert {"torch", "deepspeed"} <= found
    assert found & PICTURES_AND_TOOLS == set()


def test_reading_shards_needs_no_streaming():
    """Its packages take seconds; hashes, decompression and the order are ours."""
    reading = (
        "import numpy, zstandard",
        "from mosaic_dist.data import mds, order, shards",
        "mds.file_hash(mds.HASH, mds.decompress('zstd:3', zstandard.compress(b'1')))",
        "order.Order(numpy.array([5, 6]), seed=1).take(3, 20)",
    )
    assert imported(*reading) & PICTURES_AND_TOOLS == set()
    assert {"streaming", "transformers"} <= imported(*reading, "mds.check_compression('zstd')")  # what writing imports


def test_a_rank_loads_no_compiler():
    """DeepSpeed decorates its own Muon with torch.compile, and asks of every optimizer whether it is that."""
    muon = "from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam"
    joined = "from mosaic_dist.parallel import join_world, leave_world", "join_world(60)", "leave_world()"
    imported(*joined, muon, "assert 'torch._inductor' not in sys.modules")
    imported("import torch", muon, "assert 'torch._inductor' in sys.modules")  # so the assertion above tells something


def test_the_description_of_a_run_does_without_deepspeed():
    found = imported("import mosaic_dist.run_spec")
    assert "torch" in found
    assert found & (PICTURES_AND_TOOLS | ENGINE) == set()


def test_every_command_is_where_the_list_says():
    from mosaic_dist.cli import summary

    assert all(summary(place) for place in COMMANDS.values())
