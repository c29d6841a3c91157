"""Folders in Hugging Face's form: what we write loads with transformers, what it writes loads here."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mosaic_dist.convert.hugging_face import SafetensorsFolder, export_folder, import_folder
from mosaic_dist.convert.weights import CheckpointTensors
from mosaic_dist.data.tokenizer import Tokenizer, train_bpe
from mosaic_dist.errors import UserError
from mosaic_dist.model import GQA, Block, RMSNorm, RoPE, SwiGLU, Tied, Transformer
from tests.convert.test_twins import BOUND, ours_from, relative
from tests.convert.twins import make_twin, state, tokens, transformers

NAMES = ["gpt2", "llama-options", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe"]


def tensors_of(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A GPT-2 as transformers saves it."""
    folder = tmp_path_factory.mktemp("saved") / "gpt2"
    make_twin("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("name", NAMES)
def test_exported_folder_is_the_same_model_in_transformers(name, tmp_path):
    torch.set_num_threads(1)
    ours = ours_from(make_twin(name))
    folder = export_folder(ours.spec, tensors_of(ours), tmp_path / "hf", "fp32", max_shard_bytes=30_000)
    assert (folder / "model.safetensors.index.json").exists()
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        assert relative(loaded(tokens()).logits, ours(tokens())) < BOUND
    spec, found = import_folder(folder)
    found = dict(found)
    assert all(torch.equal(found[key], values) for key, values in tensors_of(ours).items())
    assert spec.build()  # and it is a model


@pytest.mark.parametrize("name", NAMES)
def test_saved_folder_imports_bitwise(name, tmp_path):
    twin = make_twin(name)
    twin.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    spec, found = import_folder(tmp_path / "hf")
    model = spec.build().eval()
    model.load_state_dict(dict(found), strict=False)
    right = tensors_of(ours_from(twin))
    assert all(torch.equal(values, right[key]) for key, values in tensors_of(model).items())


def test_bf16_casts_parameters_and_keeps_the_correction(tmp_path):
    ours = ours_from(make_twin("deepseek_v3"))
    folder = export_folder(ours.spec, tensors_of(ours), tmp_path / "hf", "bf16")
    dtypes = {name: values.dtype for name, values in load_file(folder / "model.safetensors").items()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == torch.bfloat16


def sentencepiece_words(folder: Path) -> Tokenizer:
    """A Unigram tokenizer, whose vocabulary is a list instead of a table."""
    library = pytest.importorskip("sentencepiece")
    lines = iter(["one two three", "two one", "three"] * 20)
    library.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(folder / "words"), vocab_size=14, minloglevel=2
    )
    return Tokenizer.load(folder / "words.model")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokenizer_goes_along_and_ends_generation(tmp_path, kind):
    words = train_bpe(["one two three " * 50], 265) if kind == "bpe" else sentencepiece_words(tmp_path)
    words.save(tmp_path / "tokenizer.json")
    block = Block(attention=GQA(heads=4, kv_heads=2), ffn=SwiGLU(hidden_dim=32))
    spec = Transformer(
        vocab_size=320, dim=32, max_seq_len=32, position=RoPE(), layers=2 * (block,), norm=RMSNorm(), head=Tied()
    )
    model = spec.build_initialized(0)
    folder = export_folder(spec, tensors_of(model), tmp_path / "hf", "fp32", tmp_path / "tokenizer.json")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded("one two", add_special_tokens=False)["input_ids"] == words.encode("one two")
    assert (loaded.eos_token_id, loaded.bos_token_id) == (words.eos_id, words.bos_id)
    config = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert config.eos_token_id == words.eos_id


def test_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    words = train_bpe(["one two three " * 50], 265)
    words.save(tmp_path / "tokenizer.json")
    ours = ours_from(make_twin("gpt2"))
    with pytest.raises(UserError, match=r"has \d+ tokens, more than the model's vocabulary \(61\)"):
        export_folder(ours.spec, tensors_of(ours), tmp_path / "hf", "fp32", tmp_path / "tokenizer.json")
    assert not (tmp_path / "hf").exists()


def test_existing_output_is_refused(tmp_path):
    ours = ours_from(make_twin("gpt2"))
    with pytest.raises(UserError, match="exists already"):
        export_folder(ours.spec, tensors_of(ours), tmp_path, "fp32")


def test_released_gpt2_form_without_prefix_and_with_masks(saved, copy):
    weights = {
        name.removeprefix("transformer."): values for name, values in load_file(copy / "model.safetensors").items()
    }
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    weights["lm_head.weight"] = weights["wte.weight"].clone()
    save_file(weights, copy / "model.safetensors")
    right, found = dict(import_folder(saved)[1]), dict(import_folder(copy)[1])
    assert all(torch.equal(found[name], right[name]) for name in right)
    save_file(weights | {"lm_head.weight": weights["wte.weight"] + 1}, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"ties lm_head.weight to the embedding, but the two tensors differ"):
        import_folder(copy)


def test_missing_and_extra_tensors_are_listed(copy):
    weights = load_file(copy / "model.safetensors")
    weights["transformer.h.0.mlp.surprise"] = weights.pop("transformer.h.1.ln_2.bias")
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"missing transformer.h.1.ln_2.bias; extra transformer.h.0.mlp.surprise"):
        import_folder(copy)


def test_tensor_of_another_shape_is_refused(copy):
    weights = load_file(copy / "model.safetensors")
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:-1].clone()
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"transformer.wpe.weight is \[63, 32\] among the weights, \[64, 32\]"):
        dict(import_folder(copy)[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "no model_type 'bert' can be converted"),
        ({"activation_function": "relu"}, "activation_function = 'relu' cannot be represented here"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config = .*'fp8'"),
        ({"n_positions": "64"}, "describes no model that can be built: max_seq_len"),
        ({"n_head": 5}, "5 heads must divide the model's width"),
        ({"n_embd": None}, "n_embd = None must be a whole number"),
    ],
)
def test_settings_that_cannot_be_represented_are_refused(copy, changes, message):
    edit_config(copy, **changes)
    with pytest.raises(UserError, match=message):
        import_folder(copy)


def test_damaged_folders_are_refused(copy, tmp_path):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(UserError, match="safetensors is missing or damaged"):
        import_folder(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has neither model.safetensors nor"):
        import_folder(copy)
    index = {"weight_map": dict.fromkeys(state(make_twin("gpt2")), "gone.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"gone.safetensors is missing"):
        dict(import_folder(copy)[1])
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(UserError, match="no weight_map from tensors to files"):
        import_folder(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        import_folder(copy)
    with pytest.raises(UserError, match="is no Hugging Face model"):
        import_folder(tmp_path / "nothing")


def test_tensors_are_read_when_asked_for(saved, monkeypatch):
    read = []
    get = SafetensorsFolder.__getitem__
    monkeypatch.setattr(SafetensorsFolder, "__getitem__", lambda self, name: (read.append(name), get(self, name))[1])
    _, found = import_folder(saved)
    assert read == []
    next(found)
    assert read == ["transformer.wte.weight"]


class StandInCheckpoint:
    """What `CheckpointTensors` asks of a checkpoint."""

    def __init__(self, model):
        self.masters, self.buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self.shapes = {name: tuple(values.shape) for name, values in tensors_of(model).items()}

    def kinds(self, name):
        return ("exp_avg", "master") if name in self.masters else ("buffer",)

    def read_full(self, name, kind):
        return {"master": self.masters, "buffer": self.buffers}[kind][name].detach()


def test_checkpoint_exports_masters_and_buffers(tmp_path):
    ours = ours_from(make_twin("deepseek_v3"))
    folder = export_folder(ours.spec, CheckpointTensors(StandInCheckpoint(ours)), tmp_path / "hf", "fp32")
    found = dict(import_folder(folder)[1])
    assert all(torch.equal(found[name], values) for name, values in tensors_of(ours).items())
