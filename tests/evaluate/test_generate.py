"""Generation against the plain way: run the whole text anew for every token, one prompt at a time."""

from collections import Counter

import pytest
import torch

from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.generate import Sampling, draw, generate
from mosaic_dist.model import GQA, MLA, Block, DecoupledRoPE, LinearAttention, MoE, RoPE, SwiGLU, Transformer

FFN = MoE(expert=SwiGLU(hidden_dim=16), experts=4)
MODELS = {
    "window": (GQA(heads=4, kv_heads=2, sliding_window=4), RoPE()),
    "mla": (MLA(heads=2, kv_compression_dim=8), DecoupledRoPE(rope_head_dim=4)),
    "linear": (LinearAttention(heads=2), RoPE()),
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9]]
GREEDY = Sampling(temperature=0.0)


def make(name: str, max_seq_len: int = 32):
    attention, position = MODELS[name]
    blocks = 2 * (Block(attention=attention, ffn=FFN),)
    model = Transformer(
        vocab_size=11, dim=16, max_seq_len=max_seq_len, position=position, layers=blocks
    ).build_initialized(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # far from uniform, so that a wrong cache shows
    return model.eval()


@torch.no_grad()
def plain(model, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_unequal_length_get_what_each_gets_alone(name):
    model = make(name)
    steps = list(generate(model, PROMPTS, 12, GREEDY))
    for i, prompt in enumerate(PROMPTS):
        assert [step[i] for step in steps] == plain(model, prompt, 12)


def test_a_prompt_ends_with_the_stop_token():
    model = make("window")
    free = [step[0] for step in generate(model, PROMPTS[:1], 12, GREEDY)]
    stop = free[4]
    got = [step[0] for step in generate(model, PROMPTS[:1], 12, GREEDY, stop_tokens=[-1, stop])]
    assert got == free[: free.index(stop)]


def test_generation_goes_on_beyond_the_context():
    steps = list(generate(make("mla", max_seq_len=8), [[1, 2, 3]], 20, GREEDY))
    assert len(steps) == 20
    assert all(0 <= step[0] < 11 for step in steps)


def test_the_draw_obeys_its_settings():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])

    def drawn(**settings) -> Counter:
        generator = torch.Generator().manual_seed(0)
        return Counter(draw(logits, [0], Sampling(**settings), generator) for _ in range(2000))

    probs = logits.softmax(0)
    for token, count in drawn().items():
        assert count / 2000 == pytest.approx(probs[token].item(), abs=0.04)
    assert set(drawn(top_k=2)) == {0, 1}
    assert set(drawn(top_p=0.6)) == {0}  # 0.64
    assert set(drawn(top_p=0.7)) == {0, 1}
    assert set(drawn(temperature=0.0)) == {0}
    assert set(drawn(temperature=0.0, repetition_penalty=3.0)) == {1}
    assert drawn(temperature=5.0)[3] > drawn()[3]


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="no tokens"):
        next(generate(make("mla"), [[1], []], 1))
