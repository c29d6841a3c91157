"""Models without a twin: their folders load where nothing of ours is installed, and give the same numbers."""

import ast
import dataclasses
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mosaic_small
import mosaic_ternary
import nano_gpt
import pytest
import torch
from safetensors.torch import load_file, save_file

import mosaic_dist
from mosaic_dist.convert.hugging_face import config_from_spec, export_folder, how_to_load, import_folder
from mosaic_dist.convert.hugging_face.joined import join_sources
from mosaic_dist.convert.hugging_face.standalone import CLASS_NAME, LEFT_OUT, TEMPLATE, source_code
from mosaic_dist.data.tokenizer import Tokenizer, train_bpe
from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.generate import Sampling, generate
from mosaic_dist.model import (
    GELU,
    MHA,
    ALiBi,
    Block,
    LinearAttention,
    MoE,
    MuP,
    RMSNorm,
    RoPE,
    SigmoidTopK,
    SwiGLU,
    Transformer,
    UnitHead,
    Untied,
)
from mosaic_dist.spec import Spec, override
from tests.convert.twins import transformers
from tests.launch import ROOT, clean_environment

LENGTH, GAP, WORDS = 9, 3, 61
WIDER, NARROWER = 70, 50  # as in standalone_loads.py
SMALL = {"vocab_size": WORDS, "dim": 32, "max_seq_len": 32, "layers.attention.heads": 2}
LATENT = SMALL | {
    "layers.attention.kv_compression_dim": 16,
    "position.rope_head_dim": 8,
    "layers.ffn.expert.hidden_dim": 24,
    "layers.ffn.experts": 4,
}


def cut(spec: Transformer) -> Transformer:
    return dataclasses.replace(spec, layers=spec.layers[:2])


MODELS = {
    "latent": cut(override(mosaic_small.run.model, LATENT)),
    "ternary": cut(override(mosaic_ternary.run.model, LATENT)),
    "nano": cut(override(nano_gpt.run.model, SMALL | {"layers.ffn.hidden_dim": 48})),
    "linear": Transformer(
        vocab_size=WORDS,
        dim=32,
        max_seq_len=32,
        position=RoPE(),
        layers=2 * (Block(attention=LinearAttention(heads=2, chunk=4), ffn=GELU(hidden_dim=48)),),
        norm=RMSNorm(),
        head=Untied(),
        init=MuP(base={"dim": 16}),
    ),
    "bf16": Transformer(
        vocab_size=WORDS,
        dim=32,
        max_seq_len=32,
        position=ALiBi(),
        layers=(
            Block(
                attention=MHA(heads=4, logit_softcap=5.0, kernel="explicit", sliding_window=5),
                ffn=MoE(expert=SwiGLU(hidden_dim=24), experts=4, router=SigmoidTopK()),
            ),
        ),
        head=UnitHead(tied=True),
    ),
}


NO_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}
LEFT_OUT_BY = {"4.57.1": {"tie_word_embeddings"} | NO_TOKENS, "5.24.0": {"use_cache"}}
"""What versions of transformers leave out of the config.json of `nano` when they save it."""


def as_saved_by(version: str, config: dict) -> dict:
    """config.json of `nano` in the form of a version of transformers."""
    kept = {key: value for key, value in config.items() if key not in LEFT_OUT_BY[version] | {"torch_dtype"}}
    return kept | {"dtype": config["torch_dtype"], "transformers_version": version}


def make(name: str):
    """The model with noise on all of its tensors; in bfloat16, but for buffers, where it is named so."""
    model = MODELS[name].build_initialized(0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in tensors_of(model).values():
            values.add_(0.2 * torch.randn(values.shape, generator=generator))
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16() if name == "bf16" else parameter.data
    return model


def tensors_of(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def inputs() -> dict[str, torch.Tensor]:
    """Texts, the same with the first GAP tokens of the first one taken for padding, and labels with some left out."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, WORDS, (2, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :GAP] = 0
    labels = tokens.clone()
    labels[1, 4:7] = -100
    return {"tokens": tokens, "left": tokens.clone(), "mask": mask, "labels": labels}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("standalone")
    for name in MODELS:
        dtype = "bf16" if name == "bf16" else "fp32"
        export_folder(MODELS[name], tensors_of(make(name)), root / name, dtype, max_shard_bytes=30_000)
    train_bpe(["one two three " * 50], 265).save(root / "tokenizer.json")
    words = dataclasses.replace(MODELS["nano"], vocab_size=320)
    tensors = tensors_of(words.build_initialized(0))
    export_folder(words, tensors, root / "words", "fp32", root / "tokenizer.json")
    for version in LEFT_OUT_BY:
        shutil.copytree(root / "nano", root / f"nano-{version}")
        config = json.loads((root / "nano" / "config.json").read_text())
        (root / f"nano-{version}" / "config.json").write_text(json.dumps(as_saved_by(version, config)))
    save_file(inputs(), root / "inputs.safetensors")
    (root / "names.json").write_text(json.dumps(list(MODELS)))
    environment = clean_environment() | {"HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in environment.items() if name != "HF_MODULES_CACHE"}
    done = subprocess.run(
        [sys.executable, "-I", Path(__file__).with_name("standalone_loads.py"), root],
        cwd=root,
        env=environment,
        text=True,
        check=False,
        timeout=300,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return root


@pytest.fixture(scope="module")
def outputs(root):
    return load_file(root / "outputs.safetensors")


@pytest.fixture(params=MODELS)
def name(request):
    torch.set_num_threads(1)
    return request.param


@torch.no_grad()
def test_logits_are_ours_to_the_bit(name, outputs):
    assert torch.equal(outputs[f"{name}/logits"], make(name)(inputs()["tokens"]))


@torch.no_grad()
def test_loss_is_the_mean_over_scored_labels(name, outputs):
    tokens, labels = inputs()["tokens"], inputs()["labels"]
    ours = make(name)(tokens[:, :-1], labels[:, 1:]).cross_entropy_sum / (2 * (LENGTH - 1) - 3)
    torch.testing.assert_close(outputs[f"{name}/loss"], ours, rtol=2e-3 if name == "bf16" else 1e-5, atol=0)


@torch.no_grad()
def test_padding_on_either_side_plays_no_part(name, outputs):
    model, tokens = make(name), inputs()["tokens"]
    exact = {"rtol": 0.05, "atol": 0.1} if name == "bf16" else {"rtol": 1e-4, "atol": 1e-4}
    alone = model(tokens[:1, GAP:])[0]
    torch.testing.assert_close(outputs[f"{name}/left"][0, GAP:], alone, **exact)
    torch.testing.assert_close(outputs[f"{name}/left"][1], model(tokens[1:])[0], **exact)
    assert (outputs[f"{name}/unmasked"][0, GAP:] - alone).abs().max() > 0.2  # the mask was needed
    flipped = tokens.flip(1)
    torch.testing.assert_close(outputs[f"{name}/right"][0, :-GAP], model(flipped[:1, :-GAP])[0], **exact)


def test_greedy_generation_is_ours(name, outputs):
    tokens = inputs()["tokens"]
    prompts = [tokens[0, GAP:].tolist(), tokens[1].tolist()]
    steps = list(generate(make(name), prompts, 6, Sampling(temperature=0.0)))
    assert outputs[f"{name}/greedy"][:, LENGTH:].T.tolist() == steps
    assert outputs[f"{name}/beams"].shape == (2, LENGTH + 6)


@torch.no_grad()
def test_embeddings_stand_for_tokens(name, outputs):
    assert torch.equal(outputs[f"{name}/embeds"], outputs[f"{name}/logits"])
    assert torch.equal(outputs[f"{name}/greedy from embeds"], outputs[f"{name}/greedy"][:, LENGTH:])


@torch.no_grad()
def test_hidden_states_are_what_layers_and_head_see(name, outputs):
    model, seen = make(name), []
    for module in (*model.layers, model.head):
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(inputs()["tokens"])
    states = [outputs[f"{name}/state {i}"] for i in range(len(seen))]
    assert f"{name}/state {len(seen)}" not in outputs
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(states, seen, strict=True))


def test_checkpointed_layers_have_the_same_gradients_in_less_memory(name, outputs):
    for kind in ("checkpointed", "reentrant"):
        assert torch.equal(outputs[f"{name}/gradients {kind}"], outputs[f"{name}/gradients plain"])
        assert outputs[f"{name}/bytes {kind}"] < outputs[f"{name}/bytes plain"] / 2
    assert outputs[f"{name}/gradients plain"].any()


@torch.no_grad()
@pytest.mark.parametrize("rows", [WIDER, NARROWER])
def test_resized_models_are_models_of_so_many_tokens(name, rows, root, outputs):
    spec, found = import_folder(root / f"{name}-{rows}")
    assert spec == dataclasses.replace(MODELS[name], vocab_size=rows)
    model = spec.build().eval()
    tensors = dict(found)
    for key, values in tensors_of(model).items():
        values.data = tensors[key]
    tokens, logits = inputs()["tokens"].clamp(max=NARROWER - 1), outputs[f"{name}/resized {rows}"]
    assert torch.equal(logits, model(tokens))
    assert torch.equal(logits[..., :WORDS], make(name)(tokens)[..., :rows])
    assert torch.equal(outputs[f"{name}/resized greedy {rows}"][:, LENGTH], logits[:, -1].argmax(-1))
    table, old = tensors["embedding.weight"], make(name).embedding.weight
    torch.testing.assert_close(table[WORDS:], old.mean(0, keepdim=True).expand(max(rows - WORDS, 0), -1))


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
def test_offloaded_weights_give_the_same_logits(name, how, outputs):
    pytest.importorskip("accelerate")
    assert torch.equal(outputs[f"{name}/{how}"], outputs[f"{name}/logits"])


@pytest.mark.parametrize("name", ["latent", "nano"])
def test_exported_programs_take_other_batches_and_lengths(name, outputs):
    if f"{name}/exported" not in outputs and name != "nano":
        pytest.skip("this torch exports experts in bfloat16 only")
    torch.testing.assert_close(outputs[f"{name}/exported"], outputs[f"{name}/logits"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["latent", "nano"])
def test_adapters_change_the_weights_that_the_model_uses(name, root, outputs):
    pytest.importorskip("peft")
    model, adapters = make(name), load_file(root / f"{name}-lora" / "adapter_model.safetensors")
    scale = 8 / 2  # lora_alpha's default over the rank
    changed = {key.split(".model.model.")[1].rsplit(".", 2)[0] for key in adapters}
    for layer in changed:
        down, up = (adapters[f"base_model.model.model.{layer}.lora_{kind}.weight"] for kind in "AB")
        model.get_submodule(layer).weight += scale * up @ down
    ours = model(inputs()["tokens"])
    assert (ours - outputs[f"{name}/logits"]).abs().max() > 0.1
    torch.testing.assert_close(outputs[f"{name}/adapted"], ours, rtol=1e-3, atol=1e-3)  # summed in another order


def test_what_a_tokenizer_gives_is_what_generation_takes(root, outputs):
    words = Tokenizer.load(root / "words")
    prompt = words.encode_prompt("one two")
    assert outputs["words"][0, :-2].tolist() == prompt


def test_folders_come_back_to_the_bit(name, root):
    right = tensors_of(make(name))
    for folder in (root / name, root / f"{name}-saved"):  # ours, and as transformers saves it again
        spec, found = import_folder(folder)
        found = dict(found)
        assert spec == MODELS[name]
        assert found.keys() == right.keys()
        assert all(torch.equal(found[key], values) for key, values in right.items())
        assert all(found[key].dtype == values.dtype for key, values in right.items())


@pytest.mark.parametrize("version", LEFT_OUT_BY)
def test_folders_that_other_versions_saved(version, root, outputs):
    assert torch.equal(outputs[f"nano-{version}/logits"], outputs["nano/logits"])
    if version == transformers.__version__:
        ours, theirs = (json.loads((root / name / "config.json").read_text()) for name in ("nano", "nano-saved"))
        assert as_saved_by(version, ours) == theirs


def test_what_cannot_be_is_told(name, root):
    errors = json.loads((root / "errors.json").read_text())
    assert "padding inside a text" in errors[f"{name}/hole"]
    assert "load it with from_pretrained" in errors[f"{name}/config"]
    assert errors[f"{name}/both"] == "give either input_ids or inputs_embeds, not both"
    assert errors[f"{name}/neither"] == "give either input_ids or inputs_embeds, not neither"
    assert "output_attentions=True" in errors[f"{name}/attentions"]
    assert "mean_resizing=False" in errors[f"{name}/rows"]
    assert "export without one" in errors.get(f"{name}/export", "export without one")


def test_words_to_load_it(root):
    assert how_to_load(root / "latent").endswith("/latent', trust_remote_code=True)")


def test_settings_beside_the_spec_must_agree(root, tmp_path):
    shutil.copytree(root / "nano", tmp_path, ignore=shutil.ignore_patterns("checksums.json"), dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(UserError, match="hidden_size = 64 cannot be represented here; only 32"):
        import_folder(tmp_path)


# --- the joined file ----------------------------------------------------------------------------------------------


def all_kinds(family: type[Spec]) -> set[type[Spec]]:
    found = {cls for child in family.__subclasses__() for cls in {child, *all_kinds(child)}}
    return {cls for cls in found if cls.__module__.startswith("mosaic_dist.model")}


def needs(source: str) -> set[str]:
    """Packages that a source imports, without those of Python itself."""
    found = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    found |= {a.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for a in node.names}
    return {name.split(".")[0] for name in found} - sys.stdlib_module_names


def test_all_parts_together_join_without_a_clash():
    """A part whose helper has the name of another part's is noticed here, not by whoever exports the two."""
    roots = sorted((cls.__module__, cls.__name__) for cls in all_kinds(Spec))
    source = join_sources([*roots, (TEMPLATE, CLASS_NAME)], LEFT_OUT)
    defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert {cls.__name__ for cls in all_kinds(Spec)} <= defined
    assert needs(source) == {"torch", "transformers"}


def recipes_without_twin() -> list[str]:
    found = []
    for path in sorted((ROOT / "recipes").glob("*.py")):
        run = getattr(importlib.import_module(path.stem), "run", None)
        if run is not None:
            try:
                config_from_spec(run.model)
            except UserError:
                found.append(path.stem)
    return found


@pytest.mark.parametrize("recipe", recipes_without_twin())
def test_every_recipe_is_built_by_its_own_file(recipe, tmp_path):
    """The joined file, as a module of its own, makes the same tensors as the package."""
    spec = importlib.import_module(recipe).run.model
    code = source_code(spec)
    assert needs(code) == {"torch", "transformers"}
    assert source_code(spec) == code
    path = tmp_path / f"joined_{recipe}.py"
    path.write_text(code)
    found = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module
    try:
        found.loader.exec_module(module)
        with torch.device("meta"):
            theirs = module.Transformer.from_dict(spec.to_dict()).build()
            ours = spec.build()
    finally:
        del sys.modules[path.stem]
    assert type(theirs) is not type(ours)
    assert {key: value.shape for key, value in theirs.state_dict().items()} == {
        key: value.shape for key, value in ours.state_dict().items()
    }


def test_only_what_is_needed_is_in_the_file(root):
    code = {name: (root / name / "modeling_mosaic.py").read_text() for name in MODELS}
    for word, holders in {
        "class LinearAttention": {"linear"},
        "class LatentAttention": {"latent", "ternary"},
        "class TernaryLinear": {"ternary"},
        "class ALiBi": {"bf16"},
        "def check_pair": set(),
        "import yaml": set(),
    }.items():
        assert {name for name in MODELS if word in code[name]} == holders, word
    assert "# Written by mosaic_dist" in code["nano"].splitlines()[0]


MODULES = {
    "low": """import re as regex
import os

# why three
LIMIT = 3
\"\"\"What it is.\"\"\"


def High():
    return os  # nobody needs this one
""",
    "high": """from math import inf

from mosaic_dist.low import LIMIT, regex


class High:
    def keep(self):
        return LIMIT, inf

    @property
    def drop(self):
        return regex
""",
    "clash": "from mosaic_dist.high import High\n\nLIMIT = High\n",
    "builtin": "def sum(x):\n    return x\n",
    "renamed": "from mosaic_dist.low import LIMIT as L\n\nM = L\n",
    "missing": "from mosaic_dist.low import nothing\n\nX = nothing\n",
}
JOINED = """from math import inf


# --- mosaic_dist.low ---


# why three
LIMIT = 3
\"\"\"What it is.\"\"\"


# --- mosaic_dist.high ---


class High:
    def keep(self):
        return LIMIT, inf
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Modules of few lines in the package's place."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(mosaic_dist, "__path__", [str(tmp_path), *mosaic_dist.__path__])
    importlib.invalidate_caches()


def test_what_is_taken_by_hand(package):
    assert join_sources([("mosaic_dist.high", "High")], ["mosaic_dist.high.High.drop"]) == JOINED
    assert join_sources([("mosaic_dist.high", "High")]).startswith("import re as regex\nfrom math import inf\n\n\n")


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("clash.LIMIT", "LIMIT is .* and .*: rename one"),
        ("builtin.sum", "has the name of a builtin"),
        ("renamed.M", "renames"),
        ("missing.X", "low has no nothing"),
        ("high.Low", "high has no Low"),
    ],
)
def test_what_cannot_be_joined(package, root, message):
    with pytest.raises(AssertionError, match=message):
        join_sources([(f"mosaic_dist.{root.split('.')[0]}", root.split(".")[1])])
