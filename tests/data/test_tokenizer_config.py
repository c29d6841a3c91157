"""Tokenizers in the form of released models: what they name, what is saved, and what transformers reads of that."""

import base64
import json
import pickle
from pathlib import Path

import pytest
import transformers

from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from tests.data import foreign
from tests.data.foreign import CHAT, DEEPSEEK_BOS, DEEPSEEK_EOS

KINDS = {"qwen": foreign.qwen, "llama3": foreign.llama3, "deepseek": foreign.deepseek}
TEXT = "the tokens of <s> text\n</s>"


def names(tokenizer: Tokenizer) -> list[str | None]:
    return [tokenizer.tokens[role] for role in ("bos_token", "eos_token", "pad_token")]


def of_transformers(folder: Path):
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_survive_and_transformers_reads_them(kind, tmp_path):
    original = of_transformers(KINDS[kind](tmp_path / "original"))
    tokenizer = Tokenizer.load(tmp_path / "original")
    assert (tokenizer.tokens["bos_token"], tokenizer.eos_id) == (original.bos_token, original.eos_token_id)
    assert tokenizer.encode(TEXT) == original.encode(TEXT, add_special_tokens=False)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved", max_length=64)
    again, loaded = Tokenizer.load(tmp_path / "saved"), transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for one in (again, pickle.loads(pickle.dumps(tokenizer))):
        assert (one.tokens, one.stop_ids, one.digest) == (tokenizer.tokens, tokenizer.stop_ids, tokenizer.digest)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (original.bos_token_id, original.eos_token_id)
    assert loaded.model_max_length == 64
    assert loaded(TEXT, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXT)
    begin = [] if kind == "qwen" else [original.bos_token_id]
    assert loaded(TEXT)["input_ids"] == again.encode_prompt(TEXT) == begin + tokenizer.encode(TEXT)
    assert loaded.chat_template == original.chat_template
    assert bool(loaded.chat_template) == (kind != "deepseek")
    if kind == "llama3":
        ends = transformers.GenerationConfig.from_pretrained(tmp_path / "original").eos_token_id
        assert len(ends) == 3
        assert sorted(transformers.GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id) == ends
        assert tokenizer.stop_ids == (original.eos_token_id, ends[0], ends[1])
        assert loaded.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x<|eot_id|>"


def test_without_settings_the_usual_names_count_among_added_tokens_only(tmp_path):
    found = {}
    for kind, make in KINDS.items():
        for file in make(tmp_path / kind).iterdir():
            if file.name != "tokenizer.json":
                file.unlink()
        found[kind] = names(Tokenizer.load(tmp_path / kind))
    assert found["qwen"] == [None, "<|endoftext|>", "<|endoftext|>"]  # and not the plain <s>
    assert found["llama3"] == ["<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>"]
    assert found["deepseek"] == [DEEPSEEK_BOS, DEEPSEEK_EOS, DEEPSEEK_EOS]
    qwen = Tokenizer.load(tmp_path / "qwen")
    assert qwen.bos_id == qwen.eos_id
    assert not qwen.adds_bos


def test_older_forms_of_the_settings(tmp_path):
    foreign.llama3(tmp_path)
    for file in (*tmp_path.glob("*config.json"), tmp_path / "chat_template.jinja"):
        file.unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|eom_id|>"}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("tools")
    tokenizer = Tokenizer.load(tmp_path)
    assert names(tokenizer)[:2] == ["<|begin_of_text|>", "<|eom_id|>"]
    assert tokenizer.stop_ids == (tokenizer.eos_id, 3)
    assert tokenizer.config.chat_template == [{"name": "tools", "template": "tools"}]
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    assert Tokenizer.load(tmp_path).config.chat_template[0] == {"name": "default", "template": CHAT}


def test_options_name_any_token(tmp_path):
    foreign.qwen(tmp_path)
    chosen = Tokenizer.load(tmp_path, eos="<|im_start|>", bos="<s>")
    assert names(chosen) == ["<s>", "<|im_start|>", "<|endoftext|>"]
    assert chosen.stop_ids[0] == chosen.eos_id != chosen.bos_id
    with pytest.raises(UserError, match=r"no token '<\|im_stop\|>', .* eos_token .*; it has '<\|im_start\|>'"):
        Tokenizer.load(tmp_path, eos="<|im_stop|>")
    with pytest.raises(UserError, match=r"no token '<bos>', .* bos_token .*; it has '<\|endoftext\|>', '<\|im_start"):
        Tokenizer.load(tmp_path, bos="<bos>")
    foreign.deepseek(tmp_path / "deepseek")
    with pytest.raises(UserError, match=f"it has '{DEEPSEEK_EOS}'"):  # the bar of ASCII is another character
        Tokenizer.load(tmp_path / "deepseek", eos=DEEPSEEK_EOS.replace("\uff5c", "|"))


def test_a_bos_before_each_text(tmp_path):
    llama3, qwen = (Tokenizer.load(KINDS[kind](tmp_path / kind)) for kind in ("llama3", "qwen"))
    assert llama3.adding_bos() is llama3
    with pytest.raises(UserError, match=r"has no BOS, .* name another token with --bos"):
        qwen.adding_bos()
    for options in ({"bos": "<|im_end|>"}, {"eos": "<s>", "bos": "<s>"}):
        with pytest.raises(UserError, match=r"the same token '.*' for BOS and EOS"):
            Tokenizer.load(tmp_path / "qwen", **options).adding_bos()
    with_bos = Tokenizer.load(tmp_path / "qwen", bos="<s>").adding_bos()
    assert with_bos.encode(TEXT) == qwen.encode(TEXT)
    assert with_bos.encode_prompt(TEXT) == [with_bos.bos_id, *qwen.encode(TEXT)]
    assert with_bos.has_ids_of(qwen)
    assert with_bos.digest != qwen.digest
    assert not with_bos.has_ids_of(llama3)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"eos_token": "<|gone|>"}, r"no token '<\|gone\|>', which is named as its eos_token"),
        ("tokenizer_config.json", {"eos_token": None}, "has no end-of-document token"),
        ("tokenizer_config.json", {"bos_token": 1}, "bos_token = 1 must be a token's text"),
        ("tokenizer_config.json", [], r"tokenizer_config\.json holds list, not a mapping"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id = 'x' must be a token id or a list"),
        ("generation_config.json", {"eos_token_id": [1, 5000]}, r"has \d+ tokens, and eos_token_id in .* \[1, 5000\]"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, file, content, message):
    foreign.llama3(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)
    (tmp_path / file).write_text("{")
    with pytest.raises(UserError, match=rf"{file} is not JSON"):
        Tokenizer.load(tmp_path)


def test_tiktoken_files_are_recognised(tmp_path):
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the"]
    lines = b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(ranks))
    message = r"is a tiktoken vocabulary, .* Use the tokenizer\.json of the same model"
    for name, load in (("tokenizer.model", "."), ("tokenizer.model", "tokenizer.model"), ("qwen.tiktoken", ".")):
        (tmp_path / name).write_bytes(lines)
        with pytest.raises(UserError, match=rf"{name} {message}"):
            Tokenizer.load(tmp_path / load)
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer.model").write_bytes(lines)
    foreign.llama3(tmp_path)
    assert Tokenizer.load(tmp_path).tokens["eos_token"] == "<|eot_id|>"  # tokenizer.json comes first
