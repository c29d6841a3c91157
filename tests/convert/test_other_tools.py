"""Exported folders in the hands of other projects' tools, as their users call them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from mosaic_dist.convert.hugging_face import export_folder
from mosaic_dist.data.tokenizer import Tokenizer, train_bpe
from mosaic_dist.model import (
    GELU,
    GQA,
    MHA,
    Block,
    LayerNorm,
    Learned,
    RMSNorm,
    RoPE,
    SwiGLU,
    Tied,
    Transformer,
    Untied,
)
from tests.convert.twins import transformers
from tests.data import foreign

LLAMA = Transformer(
    vocab_size=1,
    dim=32,
    max_seq_len=64,
    position=RoPE(),
    layers=2 * (Block(attention=GQA(heads=4, kv_heads=2), ffn=SwiGLU(hidden_dim=48)),),
    norm=RMSNorm(),
    head=Untied(),
)
GPT2 = Transformer(
    vocab_size=1,
    dim=32,
    max_seq_len=64,
    position=Learned(),
    layers=2 * (Block(attention=MHA(heads=4, bias=True), ffn=GELU(hidden_dim=40, bias=True)),),
    norm=LayerNorm(),
    head=Tied(),
)


def bpe(folder):
    """A tokenizer with BOS and EOS, and no token for what is unknown."""
    train_bpe(["one two three " * 50], 265).save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


def without_bos(folder):
    return foreign.qwen(folder / "qwen")


CASES = [
    pytest.param((LLAMA, bpe), id="llama"),
    pytest.param((GPT2, bpe), id="gpt2"),
    pytest.param((GPT2, without_bos), id="gpt2 without BOS"),
]


@pytest.fixture(params=CASES)
def exported(request, tmp_path):
    """The model with large random weights, its tokenizer, and the folder of both."""
    torch.set_num_threads(1)
    spec, make_words = request.param
    words = Tokenizer.load(make_words(tmp_path))
    model = dataclasses.replace(spec, vocab_size=words.vocab_size).build_initialized(0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            values.add_(0.2 * torch.randn(values.shape, generator=generator))
    tensors = dict(model.named_parameters())
    return model, words, export_folder(model.spec, tensors, tmp_path / "hf", "fp32", words.origin)


@torch.no_grad()
def test_ctranslate2_scores_and_generates_the_same(exported, tmp_path):
    library = pytest.importorskip("ctranslate2")
    model, words, folder = exported
    library.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "converted"))
    runner = library.Generator(str(tmp_path / "converted"), device="cpu", intra_threads=1)
    ids = words.encode("one two three")
    prompt = transformers.AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids)
    scores_BTV = torch.from_numpy(np.array(runner.forward_batch([prompt], return_log_probs=True)))
    torch.testing.assert_close(scores_BTV, model(torch.tensor([ids])).log_softmax(-1), rtol=1e-5, atol=2e-5)
    (result,) = runner.generate_batch(
        [prompt], max_length=8, sampling_topk=1, include_prompt_in_result=False, end_token=[]
    )
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert result.sequences_ids[0] == ids[-8:]


TRAINING = {"initializer_range", "use_cache", "add_cross_attention"}


@pytest.mark.parametrize("exported", CASES[1:], indirect=True)
def test_gpt2_has_the_keys_that_tools_read(exported):
    """llama.cpp's converter reads `n_ctx`; what it and others find besides is what transformers itself saves."""
    model, words, folder = exported
    config = json.loads((folder / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == model.spec.max_seq_len
    saved = transformers.AutoConfig.from_pretrained(folder).to_dict()
    of_its_own = set(transformers.GPT2Config().to_dict()) - set(transformers.PretrainedConfig().to_dict())
    needed = {key for key in of_its_own - TRAINING if not key.startswith("summary_")}
    assert needed <= config.keys()
    assert all(config[key] == saved[key] for key in needed)
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    eos = tokens["eos_token"]
    assert tokens["unk_token"] == eos
    assert tokens["bos_token"] == (eos if words.bos_id == words.eos_id else "<|bos|>")
