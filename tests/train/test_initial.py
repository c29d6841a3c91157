"""Starting weights against the model that was written: each rank's rows, the losses in every layout, the refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from mosaic_dist.convert import load_exported
from mosaic_dist.convert.hugging_face import spec_from_config
from mosaic_dist.convert.writing import write_checksums
from mosaic_dist.data.characters import character_tokenizer
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.model import Init, materialize
from mosaic_dist.parallel import place_experts
from mosaic_dist.spec import Spec, fields, override
from mosaic_dist.train.initial import MAY_DIFFER, fill, open_initial
from tests.convert.twins import make_twin, tokens
from tests.launch import check, run_ranks
from tests.parallel.tiny import batches
from tests.train.initial import CALM, MODEL, asking, tensors, trained, write

INFO = SimpleNamespace(path="data", tokenizer="none")
NO_CHECKPOINTS = Path("none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("initial") / "model", trained())


def filled(weights, spec, degree: int, rank: int):
    with torch.device("meta"):
        model = spec.build()
    place_experts(model, degree, rank)
    materialize(model, torch.device("cpu"))
    fill(model, weights)
    return model


class Seen:
    """A stored tensor that notes which of its rows are read."""

    def __init__(self, stored, rows: dict, name: str):
        self.stored, self.rows, self.name = stored, rows, name

    def __getitem__(self, rows: slice):
        self.rows[self.name] = (rows.start, rows.stop)
        return self.stored[rows]


def test_a_rank_reads_what_it_holds_and_no_more(folder):
    right = tensors(trained())
    for rank in (0, 1):
        weights, rows = open_initial(asking(folder), INFO, NO_CHECKPOINTS), {}
        stored = weights.tensors
        weights.tensors = lambda stored=stored, rows=rows: ((n, Seen(t, rows, n)) for n, t in stored())
        got = tensors(filled(weights, CALM, 2, rank))
        assert got.keys() == right.keys() == rows.keys()
        assert "layers.1.ffn.router.expert_bias" in got
        for name, tensor in got.items():
            of_experts = ".experts." in name
            expected = right[name][2 * rank : 2 * rank + 2] if of_experts else right[name]
            assert torch.equal(tensor, expected), name
            assert not of_experts or rows[name] == (2 * rank, 2 * rank + 2)


@pytest.fixture(scope="module")
def told(folder, tmp_path_factory):
    aside = tmp_path_factory.mktemp("told")
    damaged = aside / "damaged"
    shutil.copytree(folder, damaged)
    files = sorted(json.loads((damaged / "checksums.json").read_text()))
    flip(damaged / next(name for name in files[::2] if name.endswith(".safetensors")))  # in the share of rank 0
    make_twin("mixtral").save_pretrained(aside / "twin")
    folders = (folder, aside / "twin", damaged, aside / "told.json")
    check(run_ranks("tests.train.initial_ranks", 2, *map(str, folders)))
    return json.loads((aside / "told.json").read_text())


def flip(file: Path) -> None:
    """Change the last bit of a file, which is in the data of a tensor."""
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_losses_of_every_layout_are_the_exported_models(folder, told):
    inputs, targets = batches()[0]
    with torch.no_grad():
        loss = load_exported(folder)(inputs, targets).cross_entropy_sum.item() / targets.numel()
    for stage in (0, 1, 2, 3):
        for degree in (1, 2):
            assert told[f"{stage}/{degree}"] == pytest.approx([loss, loss], abs=1e-5), (stage, degree)


def test_ranks_start_from_a_model_of_transformers(told):
    twin = make_twin("mixtral")
    inputs, targets = (tokens % twin.config.vocab_size for tokens in batches()[0])
    with torch.no_grad():
        loss = functional.cross_entropy(twin(inputs).logits.flatten(0, 1), targets.flatten()).item()
    assert told["hugging_face"] == pytest.approx([loss, loss], abs=1e-5)


def test_damage_that_one_rank_finds_is_told_by_all(told):
    assert ".safetensors is damaged, or was changed after the export: its" in told["damaged"]


@pytest.mark.parametrize("name", ["mixtral", "llama-options"])
def test_a_hugging_face_folder(name, tmp_path):
    torch.set_num_threads(1)
    twin = make_twin(name)
    twin.save_pretrained(tmp_path)
    spec = override(spec_from_config(twin.config.to_dict()), {"layers.dropout": 0.3})
    with torch.no_grad():
        model = filled(open_initial(asking(tmp_path, spec), INFO, NO_CHECKPOINTS), spec, 1, 0).eval()
        right = twin(tokens()).logits
        torch.testing.assert_close(model(tokens()), right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))
    held = filled(open_initial(asking(tmp_path, spec), INFO, NO_CHECKPOINTS), spec, 1 if "llama" in name else 2, 0)
    for key, tensor in tensors(held).items():
        assert torch.equal(tensor, tensors(model)[key][: len(tensor)])


def test_what_the_training_alone_decides_may_differ(folder):
    other = replace(override(CALM, {"layers[1].ffn.aux_loss_coef": 0.5}), init=Init(std=0.5))
    assert open_initial(asking(folder, other), INFO, NO_CHECKPOINTS).model == MODEL


def test_every_field_that_may_differ_is_one():
    def known(cls: type[Spec]) -> set[str]:
        return {name for child in cls.__subclasses__() for name in {*fields(child), *known(child)}}

    assert known(Spec) >= MAY_DIFFER


def test_no_folder_or_a_checkpoint_means_no_starting_weights(tmp_path):
    assert open_initial(asking(""), INFO, tmp_path) is None
    (tmp_path / "step_00000004").mkdir()
    assert open_initial(asking(tmp_path / "gone"), INFO, tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dim": 64}, ["model.dim: 32 there, 64 here"]),
        ({"layers[1].ffn.experts": 8}, ["model.layers[1].ffn.experts: 4 there, 8 here"]),
        (
            {"norm.eps": 1e-6, "layers[0].ffn.hidden_dim": 64},
            ["norm.eps: 1e-05 there", "ffn.hidden_dim: 48 there, 64 here"],
        ),
        ({"max_seq_len": 48}, ["model.position.weight: (24, 32) there, (48, 32) here"]),
        ({"head": "linear"}, ["model.head: 'tied' there, 'linear' here"]),
    ],
)
def test_another_model_is_refused_with_all_differences(folder, changes, says):
    with pytest.raises(UserError, match="holds another model; change these fields") as caught:
        open_initial(asking(folder, override(CALM, changes)), INFO, NO_CHECKPOINTS)
    assert [text for text in says if text not in str(caught.value)] == []


def test_fewer_layers_are_another_model(tmp_path):
    dense = replace(CALM, layers=2 * CALM.layers[:1])
    write(tmp_path / "model", dense.build_initialized(0), dense)
    with pytest.raises(UserError, match=r"model\.layers: '2 layers' there, '3 layers' here"):
        open_initial(asking(tmp_path / "model", replace(CALM, layers=3 * CALM.layers[:1])), INFO, NO_CHECKPOINTS)


def broken(folder: Path, copy: Path, harm: str) -> None:
    """Copy an exported model and harm the copy."""
    shutil.copytree(folder, copy)
    index = copy / "model.safetensors.index.json"
    document, last = json.loads(index.read_text()), max(copy.glob("*.safetensors"))
    if harm == "header":
        last.write_bytes(b"\xff" * 8 + last.read_bytes()[8:])
    elif harm == "file":
        last.unlink()
    elif harm == "missing":
        del document["weight_map"]["norm.weight"]
    elif harm == "moved":
        first, *_, last = sorted(set(document["weight_map"].values()))
        document["weight_map"]["norm.weight"] = first if document["weight_map"]["norm.weight"] == last else last
    elif harm == "extra":
        document["weight_map"]["norm.bias"] = document["weight_map"]["norm.weight"]
    index.write_text(json.dumps(document))
    if harm in ("version", "packed"):
        wrong = {"format_version": 99} if harm == "version" else {"ternary": "packed"}
        config = json.loads((copy / "config.json").read_text()) | wrong
        (copy / "config.json").write_text(json.dumps(config))
    elif harm == "config":
        (copy / "config.json").unlink()
    elif harm == "tokenizer":
        character_tokenizer("0123456789").save(copy / "tokenizer.json")
        (copy / "checksums.json").unlink()
        write_checksums(copy)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("missing", r"missing norm\.weight; extra none"),
        ("extra", r"missing none; extra norm\.bias"),
        ("moved", r"safetensors is missing or damaged: .*norm\.weight"),
        ("header", r"safetensors is missing or damaged: .*header"),
        ("file", "safetensors is missing or damaged: No such file"),
        ("version", "has format version 99, this version of mosaic_dist reads 1"),
        ("packed", "holds packed ternary matrices, .* export the run with --ternary float"),
        ("config", r"cannot read .*config\.json \(No such file or directory\); give a folder"),
        ("tokenizer", r"made with tokenizer none, and .* tokenize the data with"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder, tmp_path, harm, says):
    broken(folder, tmp_path / "copy", harm)
    character_tokenizer("abc").save(tmp_path / "tokenizer.json")
    info = SimpleNamespace(**vars(INFO), tokenizer_path=tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=says):
        open_initial(asking(tmp_path / "copy"), info, NO_CHECKPOINTS)


def test_a_bos_before_each_text_makes_no_other_tokenizer(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    plain = json.loads(character_tokenizer("abc").to_json()) | {"post_processor": None}
    Tokenizer(json.dumps(plain)).save(copy)
    write_checksums(copy)
    with_bos = Tokenizer.load(copy).adding_bos()
    with_bos.save(tmp_path)
    info = SimpleNamespace(path="data", tokenizer=with_bos.digest, tokenizer_path=tmp_path / "tokenizer.json")
    assert with_bos.digest != Tokenizer.load(copy).digest
    assert open_initial(asking(copy), info, NO_CHECKPOINTS) is not None


def test_a_file_without_a_checksum_is_not_proven(folder, tmp_path):
    copy, file = tmp_path / "copy", min(folder.glob("*.safetensors")).name
    shutil.copytree(folder, copy)
    open_initial(asking(copy), INFO, NO_CHECKPOINTS).verify(0, 1)
    sums = json.loads((copy / "checksums.json").read_text())
    del sums[file]
    (copy / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(UserError, match=rf"checksums\.json does not list {file}"):
        open_initial(asking(copy), INFO, NO_CHECKPOINTS).verify(0, 1)
