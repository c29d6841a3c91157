"""End tokens and chat templates on their way through an import and both forms of export."""

import json

import pytest
import transformers

from mosaic_dist.commands import models
from mosaic_dist.convert import load_exported
from mosaic_dist.convert.hugging_face import export_folder
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.model import GQA, Block, RMSNorm, RoPE, SwiGLU, Tied, Transformer
from tests.data import foreign
from tests.data.foreign import CHAT

BLOCK = Block(attention=GQA(heads=2, kv_heads=1), ffn=SwiGLU(hidden_dim=16))
SPEC = Transformer(
    vocab_size=320, dim=16, max_seq_len=32, position=RoPE(), layers=(BLOCK,), norm=RMSNorm(), head=Tied()
)


def test_end_tokens_and_chat_template_survive(tmp_path, monkeypatch):
    words = Tokenizer.load(foreign.llama3(tmp_path / "llama3"))
    model = SPEC.build_initialized(0)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    export_folder(SPEC, tensors, tmp_path / "first", "fp32", tmp_path / "llama3")
    models.import_model(str(tmp_path / "first"), str(tmp_path / "native"))
    export_folder(SPEC, tensors, tmp_path / "second", "fp32", tmp_path / "native" / "tokenizer.json")
    for folder in ("first", "second"):
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert loaded.chat_template == CHAT
        assert (loaded.bos_token_id, loaded.eos_token_id) == (words.bos_id, words.eos_id)
        assert loaded("one <s>")["input_ids"] == words.encode_prompt("one <s>")
        network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert network.generation_config.eos_token_id == list(words.stop_ids)
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (words.bos_id, list(words.stop_ids))
    assert load_exported(tmp_path / "native").spec.vocab_size == SPEC.vocab_size  # proves the checksums of all files
    stops = []
    monkeypatch.setattr(models, "generate_tokens", lambda *words: stops.append(words[-1]) or iter(()))
    models.generate(str(tmp_path / "native"), "one")
    assert stops == [words.stop_ids]


@pytest.mark.parametrize("kind", ["qwen", "deepseek"])
def test_tokenizers_without_extra_end_tokens(kind, tmp_path):
    getattr(foreign, kind)(tmp_path / "folder")
    (tmp_path / "folder" / "generation_config.json").unlink(missing_ok=True)
    words = Tokenizer.load(tmp_path / "folder")
    tensors = dict(SPEC.build_initialized(0).named_parameters())
    folder = export_folder(SPEC, tensors, tmp_path / "hf", "fp32", tmp_path / "folder")
    assert not (folder / "generation_config.json").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == words.eos_id
    assert config["bos_token_id"] == (None if kind == "qwen" else words.bos_id)
