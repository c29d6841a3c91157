"""`export --model` and `import`: models in the native format go to Hugging Face's and back."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mosaic_dist.commands.models import export, import_model
from mosaic_dist.convert import load_exported, write_model
from mosaic_dist.errors import UserError
from mosaic_dist.model import GQA, Block, MoE, RMSNorm, RoPE, SoftmaxTopK, SwiGLU, Transformer, Untied
from mosaic_dist.spec import override
from tests.convert.test_twins import BOUND, relative
from tests.convert.twins import make_twin, tokens, transformers

QWEN = Transformer(
    vocab_size=61,
    dim=32,
    max_seq_len=64,
    position=RoPE(),
    layers=2
    * (
        Block(
            attention=GQA(heads=4, kv_heads=2, qk_norm=True),
            ffn=MoE(expert=SwiGLU(hidden_dim=24), experts=4, top_k=2, router=SoftmaxTopK(normalize=True)),
        ),
    ),
    norm=RMSNorm(eps=1e-5),
    head=Untied(),
)


def written(spec, folder, **options):
    """An exported model with initial weights, in the native format."""
    tensors = spec.build_initialized(0).state_dict()
    return write_model(folder, spec, tensors.items(), {"run": "r", "step": 7}, None, **options)


def test_a_model_is_exported_without_its_run(tmp_path, capsys):
    native = written(QWEN, tmp_path / "native")
    export(str(tmp_path / "hf"), model=str(native), format="hf")
    assert f"exported {native} to {tmp_path / 'hf'}\nas qwen3_moe: AutoModel" in capsys.readouterr().out
    with torch.no_grad():
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()(tokens()).logits
        assert relative(found, load_exported(native)(tokens())) < BOUND


def test_a_part_that_fits_no_architecture_is_named(tmp_path, capsys):
    native = written(override(QWEN, {"layers.attention.qk_norm_eps": 1e-6}), tmp_path / "native")
    export(str(tmp_path / "hf"), model=str(native), format="hf")
    told = capsys.readouterr().out
    assert "qwen3_moe: layers[0].attention.qk_norm_eps is 1e-06, and would be 1e-05\n" in told
    assert "gpt2: layers[0].ffn is 'moe', not 'gelu'\n" in told
    assert told.endswith("trust_remote_code=True)\n")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss-plain"])
def test_an_imported_model_is_exported_as_it_came(name, tmp_path):
    make_twin(name).save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), str(tmp_path / "native"))
    export(str(tmp_path / "hf"), model=str(tmp_path / "native"), format="hf")
    right, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "hf"))
    assert right.keys() == found.keys()
    assert all(torch.equal(found[key], values) for key, values in right.items())


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    twin = make_twin("deepseek_v3")
    twin.config.num_nextn_predict_layers = 1
    twin.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.3.eh_proj.weight": torch.ones(32, 64)}, file)
    with pytest.warns(UserWarning, match="num_nextn_predict_layers = 1"):
        import_model(str(tmp_path / "theirs"), str(tmp_path / "native"))
    save_file(tensors | {"model.layers.4.eh_proj.weight": torch.ones(32, 64)}, file)
    with pytest.raises(UserError, match=r"extra model.layers.4.eh_proj.weight"), pytest.warns(match="num_nextn"):
        import_model(str(tmp_path / "theirs"), str(tmp_path / "again"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": "x"}, "--model cannot be combined with --run, --checkpoint or --step"),
        ({"format": "native"}, "is in the native format already; --model requires --format hf"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export(str(tmp_path / "hf"), model="model", **{"format": "hf"} | options)


def test_packed_matrices_are_refused(tmp_path):
    spec = override(QWEN, {"layers.attention.linear": {"type": "ternary"}})
    native = written(spec, tmp_path / "native", ternary="packed")
    with pytest.raises(UserError, match="holds packed ternary matrices, which transformers cannot read"):
        export(str(tmp_path / "hf"), model=str(native), format="hf")
