"""A folder that holds files of two models, or a file that changed, is refused by every reader of models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mosaic_dist.commands.folders import inspect, verify
from mosaic_dist.commands.models import generate, import_model
from mosaic_dist.convert import load_exported, write_model
from mosaic_dist.convert.hugging_face import export_folder, import_folder
from mosaic_dist.data.tokenizer import train_bpe
from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.model_source import ModelSource
from mosaic_dist.model import GQA, Block, RMSNorm, RoPE, SwiGLU, Tied, Transformer
from mosaic_dist.train.initial import open_initial
from tests.train.initial import asking

BLOCK = Block(attention=GQA(heads=4, kv_heads=2), ffn=SwiGLU(hidden_dim=32))
SPEC = Transformer(
    vocab_size=61, dim=32, max_seq_len=32, position=RoPE(), layers=2 * (BLOCK,), norm=RMSNorm(), head=Tied()
)
ONE_FILE, SHARDS = 10**9, 20_000


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in SPEC.build_initialized(seed).named_parameters()}


def native(folder: Path, step: int, max_bytes: int, tokenizer: Path | None = None) -> Path:
    return write_model(folder, SPEC, weights(step).items(), {"run": "r", "step": step}, tokenizer, "fp32", max_bytes)


def hugging_face(folder: Path, step: int, max_bytes: int) -> Path:
    return export_folder(SPEC, weights(step), folder, "fp32", None, max_bytes)


def start_from(folder: Path) -> None:
    """What a run does with `--init_from`, up to the reading of weights."""
    data = SimpleNamespace(path="data", tokenizer="none")
    weights = open_initial(asking(folder, SPEC), data, Path("none"))
    assert weights is not None
    weights.verify(0, 1)


def evaluate_with_transformers(folder: Path) -> None:
    with ModelSource(model=str(folder)).open().in_hugging_face_form():
        pass


READERS: dict[str, list[Callable[[Path], object]]] = {
    "native": [
        load_exported,
        start_from,
        lambda folder: ModelSource(model=str(folder)).open().load(),
        lambda folder: inspect(str(folder)),
        lambda folder: verify(str(folder)),
    ],
    "hf": [
        import_folder,
        start_from,
        evaluate_with_transformers,
        lambda folder: ModelSource(model=str(folder)).open().load(),
        lambda folder: import_model(str(folder), str(folder.parent / "imported")),
        lambda folder: inspect(str(folder)),
        lambda folder: verify(str(folder)),
    ],
}
WRITERS = {"native": native, "hf": hugging_face}


def refused_by_all(form: str, folder: Path, message: str) -> None:
    for reader in READERS[form]:
        with pytest.raises(UserError, match=message):
            reader(folder)


@pytest.mark.parametrize("form", ["native", "hf"])
@pytest.mark.parametrize(
    ("old_bytes", "new_bytes", "leftover"),
    [(ONE_FILE, SHARDS, r"model\.safetensors,"), (SHARDS, ONE_FILE, r"model-00001-of-\d+\.safetensors, .*index\.json")],
)
def test_one_export_copied_over_another(
    tmp_path: Path, form: str, old_bytes: int, new_bytes: int, leftover: str
) -> None:
    merged = WRITERS[form](tmp_path / "merged", 39, old_bytes)
    shutil.copytree(WRITERS[form](tmp_path / "new", 40, new_bytes), merged, dirs_exist_ok=True)
    refused_by_all(form, merged, rf"checksums\.json does not list {leftover}")
    for reader in READERS[form]:
        reader(tmp_path / "new")


@pytest.mark.parametrize("form", ["native", "hf"])
def test_files_without_a_checksum_and_files_that_changed(tmp_path: Path, form: str) -> None:
    folder = WRITERS[form](tmp_path / "model", 40, ONE_FILE)
    for unlisted in ("z.safetensors", "tokenizer.json"):
        shutil.copyfile(folder / "model.safetensors", folder / unlisted)
        refused_by_all(form, folder, rf"checksums\.json does not list {unlisted}")
        (folder / unlisted).unlink()
    written = (folder / "checksums.json").read_text()
    (folder / "checksums.json").write_text("{}")
    refused_by_all(form, folder, r"checksums\.json does not list config\.json, model\.safetensors")
    (folder / "checksums.json").write_text(written)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    for reader in READERS[form]:
        if reader is not READERS[form][-2]:  # `inspect` reads headers only
            with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
                reader(folder)


def test_generate_reads_listed_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_bpe(["one two three " * 50], 265).save(tmp_path / "tokenizer.json")
    folder = native(tmp_path / "model", 40, ONE_FILE, tmp_path / "tokenizer.json")
    native(tmp_path / "other", 41, ONE_FILE)
    shutil.copyfile(tmp_path / "other" / "model.safetensors", folder / "z.safetensors")
    with pytest.raises(UserError, match=r"does not list z\.safetensors"):
        generate(str(folder), "one")
    assert capsys.readouterr().out == ""


def test_folders_from_elsewhere_have_no_checksums(tmp_path: Path) -> None:
    one, several = (hugging_face(tmp_path / name, 40, size) for name, size in (("one", ONE_FILE), ("many", SHARDS)))
    for folder in (one, several):
        (folder / "checksums.json").unlink()
    whole = (one / "model.safetensors").read_bytes()
    (several / "model.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match=r"index\.json does not list model\.safetensors"):
        import_folder(several)
    (one / "adapter_model.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match=r"no model\.safetensors\.index\.json that lists adapter_model\.safetensors"):
        import_folder(one)
    (one / "adapter_model.safetensors").unlink()
    (one / "consolidated.safetensors").write_bytes(b"the same weights under their author's names")
    (one / "original").mkdir()
    (one / "original" / "model.safetensors").write_bytes(b"and once more")
    (several / "model.safetensors").unlink()
    index = json.loads((several / "model.safetensors.index.json").read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = last
    (several / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"{last} does not give {name}, which the index places there"):
        dict(import_folder(several)[1])
    found = dict(import_folder(one)[1])
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(40).items())
    assert json.loads((one / "config.json").read_text())["model_type"] == "llama"
