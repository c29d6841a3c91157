"""What a real run leaves can be looked into, proven and exported checkpoint by checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from tests.checkpoint.test_foreign import LAYOUTS, write
from tests.end_to_end.conftest import SMALL, command, python, recipe, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset) -> Path:
    """Six steps of two ranks with a checkpoint at each; multiples of 2 stay beside the last."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = recipe(
        folder, dataset, "--stop_at_step", "5", "--checkpoint.keep_last", "1", "--checkpoint.keep_every", "2"
    )
    words[words.index("--checkpoint.every_steps") + 1] = "1"
    words[words.index("--validate_every_steps") + 1] = "0"
    done = train(*words)
    assert done.returncode == 0, done.stdout[-4000:]
    return folder


def test_inspect_tells_the_layout_and_the_position(trained):
    facts = json.loads(python("-m", "mosaic_dist", "inspect", trained, "--json"))
    assert [row["step"] for row in facts["checkpoints"]] == [2, 4, 5]
    newest = facts["newest"]
    layout = {"ranks": 2, "expert_parallel": 2, "sequence_parallel": 1, "zero_stage": 2, "precision": "fp32"}
    assert newest["layout"] == layout | {"accumulation": 2, "micro_batch_size": 2}  # of 8 sequences
    assert (newest["tokens"], newest["data"]["cursor"]) == (5 * 256, 5 * 256 // 32)
    assert newest["parameters"] == json.loads((trained / "environment.json").read_text())["parameters"]
    assert {"master", "exp_avg", "exp_avg_sq"} <= newest["kinds"].keys()
    assert "largest tensors" in python("-m", "mosaic_dist", "inspect", trained)


def test_verify_ends_with_zero_only_if_all_is_whole(trained, tmp_path):
    assert python("-m", "mosaic_dist", "verify", trained).count("whole: ") == 3
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    damaged = copied / "checkpoints" / "step_00000005" / "rank_00001.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = command("python", "-m", "mosaic_dist", "verify", copied, "--threads", "2")
    assert done.returncode == 2
    assert f"{damaged} is damaged" in done.stdout
    assert "step_00000004 is good" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_checkpoint_alone_exports_as_its_run_does(trained, tmp_path):
    alone = tmp_path / "copied"
    shutil.copytree(trained / "checkpoints" / "step_00000004", alone)
    export = ("-m", "mosaic_dist", "export")
    python(*export, "--run", trained, "--step", "4", "--output", tmp_path / "of_run")
    python(*export, "--checkpoint", trained / "checkpoints" / "step_00000004", "--output", tmp_path / "direct")
    python(*export, "--checkpoint", alone, "--run", trained, "--output", tmp_path / "given")
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("of_run", "direct", "given")]
    assert contents[0] == contents[1] == contents[2]
    done = command("python", *export, "--checkpoint", alone, "--output", tmp_path / "none")
    assert done.returncode == 2
    assert "lies in no run folder" in done.stdout
    assert not (tmp_path / "none").exists()


def test_a_run_does_not_start_over_beside_checkpoints_of_deepspeed(trained, dataset, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copyfile(trained / "run.yaml", folder / "run.yaml")
    theirs = write(folder / "checkpoints", LAYOUTS["3 experts a layer"])
    small = [*SMALL, "--validate_every_steps", "0"]
    done = command("python", "recipes/t4_moe.py", "--data", dataset, "--output", folder, *small)
    assert done.returncode == 2, done.stdout[-3000:]
    assert done.stdout.count("error: ") == 1
    assert f"{theirs / 'global_step40'} is a checkpoint of DeepSpeed itself" in done.stdout
    assert not (theirs / "sprung").exists()
