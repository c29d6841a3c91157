"""Wrong input: one clear message, a non-zero exit of all ranks, within seconds, and nothing left half done."""

import json
import shutil
import time
from pathlib import Path

import pytest

from mosaic_dist.cli import parse_words
from mosaic_dist.convert import write_model
from mosaic_dist.spec import override
from recipes.t4_moe import run
from tests.end_to_end.conftest import SMALL, command, recipe, train

SECONDS = 60
"""Limit of a refusal; most of it is the start of Python on two shared cores."""


def refused(words: list[str], says: str, folder: Path) -> None:
    """The command ends in time with exit code 2 and exactly one message, and has made no run folder."""
    started = time.monotonic()
    done = (command if words[0] == "python" else train)(*words, timeout=SECONDS)
    assert done.returncode == 2, done.stdout[-3000:]
    assert done.stdout.count("error: ") == 1, done.stdout[-3000:]
    assert says in done.stdout, done.stdout[-3000:]
    assert "Traceback" not in done.stdout
    assert time.monotonic() - started < SECONDS
    assert not folder.exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--model.layers.ffn.topk", "1"), "model.layers[0].ffn.topk: moe has no such field; did you mean 'top_k'?"),
        (
            ("--model.layers.ffn.experts", "3", "--expert_parallel", "2"),
            "3 experts do not divide by expert_parallel (2)",
        ),
        (
            ("--parallel.sequence_parallel", "2", "--model.layers.attention.heads", "1"),
            "model.layers[0].attention ('mha') cannot be shared by sequence_parallel (2) ranks",
        ),
        (("--data", "no/such/folder"), "no dataset at no/such/folder"),
        (("--model.vocab_size", "500"), "has a vocabulary of 512 tokens, but model.vocab_size is 500"),
    ],
)
def test_before_any_rank_meets_another(dataset, tmp_path, more, says):
    folder = tmp_path / "run"
    words = recipe(folder, dataset)
    for flag, value in zip(more[::2], more[1::2], strict=True):
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    refused(words, says, folder)


def one_process(folder: Path, data: Path, *more: str) -> list[str]:
    """The same recipe without a launcher."""
    return ["python", "recipes/t4_moe.py", "--data", str(data), "--output", str(folder), *SMALL, *more]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--ds_config", "none.json"), "cannot read the DeepSpeed config none.json"),
        (("--batch_tokens", "250"), "250 is not a multiple of the sequence length 32; nearest: 224 or 256"),
        (("--micro_batch_size", "3"), "take micro-batches of 3"),
        (("--precision", "fp16"), "'fp16' needs a GPU"),
        (("--model.layers.attention.heads", "5"), "model.layers[0].attention.heads: 5 heads must divide"),
        (("--data.seq_len", "20"), "batch_tokens: 256 is not a multiple of the sequence length 20"),
        (("--batch_ramp", "{start_tokens: 32, over_tokens: 512}"), "micro-batches of 2 take at a time; nearest: 64"),
    ],
)
def test_in_one_process(dataset, tmp_path, more, says):
    folder = tmp_path / "run"
    refused(one_process(folder, dataset, *more), says, folder)


def test_blocks_that_nothing_could_compile(dataset, tmp_path, monkeypatch):
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, "no-such-compiler")
    words = recipe(tmp_path / "run", dataset, "--parallel.compile", "true")
    refused(words, "compile needs a C", tmp_path / "run")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An exported model that the small recipe could start from, in several files."""
    model = override(run, parse_words(SMALL)[1]).model
    tensors = model.build_initialized(0).named_parameters()
    folder = tmp_path_factory.mktemp("weights") / "model"
    return write_model(folder, model, tensors, {}, None, max_shard_bytes=20_000)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--model.dim", "64"), "holds another model; change these fields of the run, or give another --init_from"),
        (("--init_from", "no/such/folder"), "cannot read no/such/folder/config.json"),
    ],
)
def test_weights_that_do_not_fit(dataset, weights, tmp_path, more, says):
    words = one_process(tmp_path / "run", dataset, "--init_from", str(weights), *more)
    refused(words, says, tmp_path / "run")


def test_weights_that_are_damaged(dataset, weights, tmp_path):
    """The rank that hashes the file sees it, all end, and the next start finds no half of a run folder."""
    damaged = tmp_path / "model"
    shutil.copytree(weights, damaged)
    file = max(damaged.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
    words = recipe(tmp_path / "run", dataset, "--init_from", str(damaged))
    refused(words, f"{file} is damaged, or was changed after the export", tmp_path / "run")


def test_exact_match_needs_questions(dataset, tmp_path):
    words = one_process(tmp_path / "run", dataset, "--exact_match_samples", "8")
    refused(words, "are no questions with an answer each; use --exact_match_samples 0", tmp_path / "run")


def test_a_tokenizer_that_is_not_the_datas(dataset, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    document = json.loads((data / "tokenizer.json").read_text())
    document["model"]["merges"] = document["model"]["merges"][:-1]
    (data / "tokenizer.json").write_text(json.dumps(document))
    refused(one_process(tmp_path / "run", data), "the tokenizer and the data", tmp_path / "run")


@pytest.mark.parametrize("harm", ["missing", "truncated", "flipped"])
def test_an_unreadable_shard_ends_all_ranks(dataset, tmp_path, harm):
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    shard = next((data / "train").glob("shard.*.mds"))
    content = bytearray(shard.read_bytes())
    if harm == "missing":
        shard.unlink()
    elif harm == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    started = time.monotonic()
    done = train(*recipe(tmp_path / "run", data), timeout=SECONDS)
    assert done.returncode == 2, done.stdout[-3000:]
    assert done.stdout.count("error: ") == 1, done.stdout[-3000:]
    assert shard.name in done.stdout
    assert time.monotonic() - started < SECONDS


def test_a_config_that_says_something_else_than_the_recipe(dataset, tmp_path):
    config = tmp_path / "ds.json"
    for content, says in (
        (
            {"train_micro_batch_size_per_gpu": 7},
            "train_micro_batch_size_per_gpu is 7 in the DeepSpeed config, but the run says 2",
        ),
        (
            {"zero_optimisation": {"stage": 2}},
            "unknown DeepSpeed key 'zero_optimisation'; did you mean 'zero_optimization'?",
        ),
        ({"optimizer": {"type": "Adam"}}, "it is the recipe that decides it"),
        ({"bf16": {"enabled": True}}, "bf16' with ZeRO stage 0 would train wrongly"),
    ):
        config.write_text(json.dumps(content))
        refused(one_process(tmp_path / "run", dataset, "--ds_config", str(config)), says, tmp_path / "run")
