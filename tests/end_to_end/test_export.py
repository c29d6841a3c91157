"""The exported model is the trained one: the same logits, the same weights in every precision, nothing missing."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mosaic_dist.checkpoint import newest
from mosaic_dist.convert import load_exported, parse_size
from mosaic_dist.errors import UserError
from mosaic_dist.files import checksum
from tests.end_to_end.conftest import command, python, recipe, train
from tests.launch import check, run_ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = train(*recipe(folder, dataset, "--stop_at_step", "4", "--validate_every_steps", "0"))
    assert done.returncode == 0, done.stdout[-4000:]
    return folder


@pytest.fixture(scope="module")
def exported(trained):
    path = trained.parent / "model"
    python("-m", "mosaic_dist", "export", "--run", trained, "--output", path)
    return path


def test_logits_equal_those_of_the_trained_model(trained, exported, tmp_path):
    check(run_ranks("tests.end_to_end.logits_ranks", 2, str(trained), str(tmp_path / "logits.safetensors")))
    truth = load_file(tmp_path / "logits.safetensors")
    with torch.no_grad():
        logits = load_exported(exported)(truth["tokens"])
    torch.testing.assert_close(logits, truth["logits"], rtol=1e-5, atol=1e-6)


def test_weights_are_the_masters_in_files_of_bounded_size(trained, exported, tmp_path):
    checkpoint = newest(trained / "checkpoints")
    weights = load_file(exported / "model.safetensors")
    assert weights.keys() == checkpoint.shapes.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, checkpoint.read_full(name, "master"))
    small = tmp_path / "bf16"
    python(
        "-m",
        "mosaic_dist",
        "export",
        "--run",
        trained,
        "--output",
        small,
        "--dtype",
        "bf16",
        "--max_shard_size",
        "20KB",
    )
    index = json.loads((small / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(small / file)[name], weights[name].bfloat16())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in weights.values())


def test_generation_is_repeatable_and_obeys_its_flags(exported):
    words = ("-m", "mosaic_dist", "generate", "--model", exported, "--prompt", "def ", "--max_new_tokens", "12")
    greedy = python(*words, "--temperature", "0")
    assert greedy.startswith("def ")
    assert greedy == python(*words, "--temperature", "0")
    assert greedy == python(*words, "--top_k", "1", "--seed", "3")


def test_damage_and_misuse_are_told(exported, trained, tmp_path):
    again = command("python", "-m", "mosaic_dist", "export", "--run", trained, "--output", exported)
    assert again.returncode == 2
    assert "exists already" in again.stdout
    nothing = command("python", "-m", "mosaic_dist", "export", "--run", tmp_path, "--output", tmp_path / "x")
    assert nothing.returncode == 2
    assert "is no run folder" in nothing.stdout
    with pytest.raises(UserError, match="is no exported model"):
        load_exported(tmp_path)
    with pytest.raises(UserError, match="'5 apples' is no size"):
        parse_size("5 apples")
    weights = exported / "model.safetensors"
    original, sum_before = weights.read_bytes(), checksum(weights)
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_exported(exported)
    weights.write_bytes(original)
    assert checksum(weights) == sum_before


def test_a_run_goes_to_hugging_face_and_back(dataset, tmp_path):
    """`gpt2_reference`, made small: transformers loads the export and gives our logits; the import gives it back."""
    run, ours, hf, back = (tmp_path / name for name in ("run", "ours", "hf", "back"))
    small = "--model.vocab_size 512 --model.dim 32 --model.max_seq_len 32 --model.layers.attention.heads 2"
    done = command(
        "python", "recipes/gpt2_reference.py", "--data", dataset, "--output", run, *small.split(),
        "--batch_tokens", "256", "--micro_batch_size", "8",
        "--model.layers.ffn.hidden_dim", "64", "--steps", "3", "--schedule.warmup_steps", "1",
        "--validate_every_steps", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    python("-m", "mosaic_dist", "export", "--run", run, "--output", ours)
    told = python("-m", "mosaic_dist", "export", "--run", run, "--output", hf, "--format", "hf")
    assert f"as gpt2: AutoModelForCausalLM.from_pretrained('{hf}')" in told
    python("-m", "mosaic_dist", "import", "--model", hf, "--output", back)
    tokens = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_exported(ours)(tokens)
        theirs = AutoModelForCausalLM.from_pretrained(hf)(tokens).logits
        assert torch.equal(load_exported(back)(tokens), expected)
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)


def test_a_run_without_a_twin_brings_its_code_and_comes_back(trained, exported, tmp_path):
    hf, back = tmp_path / "hf", tmp_path / "back"
    told = python("-m", "mosaic_dist", "export", "--run", trained, "--output", hf, "--format", "hf")
    assert f"AutoModelForCausalLM.from_pretrained('{hf}', trust_remote_code=True)" in told
    assert {"modeling_mosaic.py", "config.json", "tokenizer.json"} <= {file.name for file in hf.iterdir()}
    python("-m", "mosaic_dist", "import", "--model", hf, "--output", back)
    assert (back / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert (
        json.loads((back / "config.json").read_text())["model"]
        == json.loads((exported / "config.json").read_text())["model"]
    )


def test_what_cannot_be_packed_is_told(trained, tmp_path):
    words = (
        "python",
        "-m",
        "mosaic_dist",
        "export",
        "--run",
        trained,
        "--output",
        tmp_path / "x",
        "--ternary",
        "packed",
    )
    for more, reason in (((), "has no ternary matrices to pack"), (("--format", "hf"), "is for --format native")):
        done = command(*words, *more)
        assert done.returncode == 2
        assert reason in done.stdout
