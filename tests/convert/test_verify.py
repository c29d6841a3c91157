"""`verify` and `inspect` of every kind of folder: whole ones pass, damaged ones are named, facts are the files'."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mosaic_dist.checkpoint import TensorShard, save
from mosaic_dist.commands.folders import inspect, verify
from mosaic_dist.convert import write_model
from mosaic_dist.convert.hugging_face import export_folder
from mosaic_dist.errors import UserError
from mosaic_dist.model import GQA, Block, RMSNorm, RoPE, SwiGLU, Tied, Transformer
from recipes.t4_moe import run as recipe

BLOCK = Block(attention=GQA(heads=4, kv_heads=2), ffn=SwiGLU(hidden_dim=32))
SPEC = Transformer(
    vocab_size=61, dim=32, max_seq_len=32, position=RoPE(), layers=2 * (BLOCK,), norm=RMSNorm(), head=Tied()
)


def weights() -> dict[str, torch.Tensor]:
    return dict(SPEC.build_initialized(0).named_parameters())


def save_step(root: Path, step: int, leave_out: str = "") -> Path:
    """Masters and one moment, as a run of one process would write them."""
    values = {name: tensor.detach() for name, tensor in weights().items() if name != leave_out}
    pieces = [
        TensorShard(name, kind, 0, tensor.flatten())
        for name, tensor in values.items()
        for kind in ("master", "exp_avg")
    ]
    state = {"progress": {"step": step, "tokens": 10 * step}, "data": {"cursor": step, "fingerprint": {"seed": 3}}}
    return save(root, step, pieces, {name: tuple(tensor.shape) for name, tensor in values.items()}, state, {})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with three checkpoints."""
    folder = tmp_path / "run"
    for step in (2, 4, 6):
        save_step(folder / "checkpoints", step)
    (folder / "run.yaml").write_text(replace(recipe, model=SPEC, batch_tokens=1024).to_yaml())
    return folder


def flip_last(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def told(capsys: pytest.CaptureFixture[str], *words: str, **flags: bool) -> str:
    inspect(*words, **flags)
    return capsys.readouterr().out


def test_a_run_and_its_parts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = run / "checkpoints"
    for folder, count in ((run, 3), (checkpoints, 3), (checkpoints / "step_00000004", 1)):
        verify(str(folder))
        assert capsys.readouterr().out.count("whole: ") == count
    facts = json.loads(told(capsys, str(run), json=True))
    assert [row["step"] for row in facts["checkpoints"]] == [2, 4, 6]
    assert (facts["kind"], facts["newest"]["step"], facts["newest"]["tokens"]) == ("run", 6, 60)
    assert facts["newest"]["parameters"] == sum(tensor.numel() for tensor in weights().values())
    assert facts["newest"]["data"] == {"cursor": 6, "fingerprint": {"seed": 3}}
    one = json.loads(told(capsys, str(checkpoints / "step_00000004"), json=True))
    assert (one["kind"], one["step"]) == ("checkpoint", 4)
    text = told(capsys, str(run))
    assert all(
        word in text for word in ("newest: ", "exp_avg", "master", "embedding.weight", "61 x 32", "cursor 6, seed 3")
    )


def test_damage_is_named_with_a_good_neighbour(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    four, six = (run / "checkpoints" / f"step_0000000{step}" for step in (4, 6))
    flip_last(six / "rank_00000.safetensors")
    for folder, first in ((run, "1 of 3 not whole"), (six, "1 of 1 not whole")):
        with pytest.raises(UserError, match=first) as caught:
            verify(str(folder))
        assert f"{six / 'rank_00000.safetensors'} is damaged: its xxh3-128" in str(caught.value)
        assert str(caught.value).endswith(f"{four} is good")
    verify(str(four))
    (four / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"not a whole checkpoint: manifest\.json") as caught:
        verify(str(run))
    assert str(caught.value).endswith("step_00000002 is good")
    with pytest.raises(UserError, match=r"not a whole checkpoint: manifest\.json is missing"):
        verify(str(four))
    shutil.rmtree(run / "checkpoints" / "step_00000002")
    with pytest.raises(UserError, match=r"no checkpoint is good$"):
        verify(str(six))
    assert "not a whole checkpoint" in told(capsys, str(run))


def test_a_checkpoint_of_another_model_is_not_the_runs(run: Path) -> None:
    save_step(run / "checkpoints", 8, leave_out="norm.weight")
    with pytest.raises(UserError, match=r"step_00000008: the weights are not this model's: missing \['norm.weight'\]"):
        verify(str(run))


@pytest.mark.parametrize("form", ["native", "hf"])
def test_exported_models(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    if form == "native":
        write_model(folder, SPEC, weights().items(), {"run": "r", "step": 7}, None, "bf16", 20_000)
    else:
        export_folder(SPEC, {name: tensor.detach() for name, tensor in weights().items()}, folder, "bf16", None, 20_000)
    verify(str(folder))
    facts = json.loads(told(capsys, str(folder), json=True).partition("\n")[2])
    assert facts["parameters"] == sum(tensor.numel() for tensor in weights().values())
    assert facts["kinds"]["BF16"]["bytes"] == 2 * facts["parameters"]
    assert facts["files"] == len(list(folder.glob("*.safetensors"))) > 1
    for file in sorted(folder.iterdir()):
        if file.name == "checksums.json":
            continue
        content = file.read_bytes()
        flip_last(file)
        with pytest.raises(UserError, match=f"{file.name} is damaged"):
            verify(str(folder))
        file.unlink()
        with pytest.raises(UserError, match=f"{file.name} is missing"):
            verify(str(folder))
        file.write_bytes(content)
    verify(str(folder))
    (folder / "checksums.json").write_text("{}")
    with pytest.raises(UserError, match=r"checksums\.json does not list"):
        verify(str(folder))
    (folder / "checksums.json").unlink()
    with pytest.raises(UserError, match="nothing can be proven"):
        verify(str(folder))


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run \(run\.yaml\)"):
        inspect(str(tmp_path))
    with pytest.raises(UserError, match="is no folder"):
        verify(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="give one folder, not 0"):
        inspect()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.yaml").write_text(recipe.to_yaml())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        verify(str(tmp_path))
