"""Folders with a tokenizer in the form of well-known models, made from a small vocabulary of our own."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

DEEPSEEK_BOS, DEEPSEEK_EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
CHAT = "{% for message in messages %}{{ message['content'] }}<|eot_id|>{% endfor %}"
TEXT = "the tokens of a text end with one more token, <s> and </s> are plain text here\n"


def _byte_level(added: list[str], plain: list[str] | None = None) -> Any:
    """A byte-level BPE; the `plain` tokens have ids of the vocabulary before those of the added ones."""
    inner: Any = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    inner.train_from_iterator([TEXT] * 3, trainer)
    document = json.loads(inner.to_str())
    vocabulary = document["model"]["vocab"]
    for token in plain or []:
        vocabulary[token] = len(vocabulary)
    inner = tokenizers.Tokenizer.from_str(json.dumps(document))
    inner.decoder, inner.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    return inner


def _write(folder: Path, inner: Any, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def qwen(folder: Path) -> Path:
    """No BOS, and a plain token `<s>` in the vocabulary. Its settings name no BOS and a chat's end as EOS."""
    inner = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], plain=["<s>"])
    ids = [inner.token_to_id("<|im_end|>"), inner.token_to_id("<|endoftext|>")]
    config = {
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "chat_template": [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "tools"}],
    }
    generation = {"eos_token_id": ids, "pad_token_id": ids[1], "temperature": 0.6}
    return _write(folder, inner, tokenizer_config=config, generation_config=generation)


def llama3(folder: Path) -> Path:
    """A BOS before each text, and several tokens that end a text, of which one ends a turn."""
    inner = _byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    bos = "<|begin_of_text|>"
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, inner.token_to_id(bos))]
    )
    inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    ends = [inner.token_to_id(name) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    config = {"bos_token": bos, "eos_token": {"__type": "AddedToken", "content": "<|eot_id|>", "special": True}}
    _write(folder, inner, tokenizer_config=config, generation_config={"eos_token_id": ends})
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def deepseek(folder: Path) -> Path:
    """Names with a full-width bar, and a BOS that only the settings ask for."""
    inner = _byte_level([DEEPSEEK_BOS, DEEPSEEK_EOS])
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": True,
        "bos_token": token | {"content": DEEPSEEK_BOS},
        "eos_token": token | {"content": DEEPSEEK_EOS},
        "pad_token": token | {"content": DEEPSEEK_EOS},
        "tokenizer_class": "LlamaTokenizerFast",
    }
    return _write(folder, inner, tokenizer_config=config)
