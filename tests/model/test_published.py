"""Parameter counts that others published, from our specs, without allocating anything."""

import importlib
from pathlib import Path

import pytest

from mosaic_dist.model import (
    GELU,
    GQA,
    MHA,
    MLA,
    Block,
    DecoupledRoPE,
    LayerNorm,
    MoE,
    RoPE,
    SigmoidTopK,
    SwiGLU,
    Transformer,
    Untied,
    count_parameters,
)
from mosaic_dist.run_spec import Run
from mosaic_dist.spec import override

RECIPES = Path(__file__).parent.parent.parent / "recipes"


def recipe(name: str) -> Run:
    return importlib.import_module(name).run


@pytest.mark.parametrize(
    ("layers", "dim", "heads", "published"),
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
)
def test_gpt2(layers, dim, heads, published):
    block = Block(attention=MHA(heads=heads, bias=True), ffn=GELU(hidden_dim=4 * dim, bias=True))
    model = Transformer(vocab_size=50_257, dim=dim, max_seq_len=1024, norm=LayerNorm(), layers=layers * (block,))
    assert count_parameters(model).total == published


def test_llama2_7b_and_mixtral():
    llama = Block(attention=MHA(heads=32), ffn=SwiGLU(hidden_dim=11_008))
    mixtral = Block(attention=GQA(heads=32, kv_heads=8), ffn=MoE(expert=SwiGLU(hidden_dim=14_336), experts=8, top_k=2))
    shell = {"vocab_size": 32_000, "dim": 4096, "max_seq_len": 4096, "position": RoPE(), "head": Untied()}
    assert count_parameters(Transformer(layers=32 * (llama,), **shell)).total == 6_738_415_616
    counts = count_parameters(Transformer(layers=32 * (mixtral,), **shell))
    assert counts.total == 46_702_792_704
    assert counts.active == pytest.approx(12.9e9, rel=0.005)


def test_deepseek_v3():
    attention = MLA(heads=128, kv_compression_dim=512, q_compression_dim=1536, head_dim=128, v_head_dim=128)
    dense = Block(attention=attention, ffn=SwiGLU(hidden_dim=18_432))
    router = SigmoidTopK(num_groups=8, topk_groups=4, scale=2.5)
    experts = MoE(expert=SwiGLU(hidden_dim=2048), experts=256, top_k=8, shared_experts=1, router=router)
    model = Transformer(
        vocab_size=129_280, dim=7168, max_seq_len=4096, position=DecoupledRoPE(rope_head_dim=64), head=Untied(),
        layers=3 * (dense,) + 58 * (Block(attention=attention, ffn=experts),),
    )  # fmt: skip
    counts = count_parameters(model)
    assert counts.total == pytest.approx(671e9, rel=0.001)
    # the report counts 37B without the embedding table's look-up
    assert counts.active - counts.components["embedding"][1] == pytest.approx(36.6e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "total", "active", "within"),
    [
        ("gpt2_reference", 124_439_808, 124_439_808, 0),
        ("openai_gptoss_20b", 20.91e9, None, 0.0005),
        ("openai_gptoss_120b", 116.83e9, None, 0.0005),
        ("mosaic_small", 400e6, 150e6, 0.1),
        ("mosaic_ternary", 400e6, 150e6, 0.1),
        ("mosaic_dense", 150e6, 150e6, 0.02),
        ("t4_moe", 18_240_000, 8_802_816, 0),
    ],
)
def test_recipes_have_the_size_they_state(name, total, active, within):
    counts = count_parameters(recipe(name).model)
    assert counts.total == pytest.approx(total, rel=within)
    if active is not None:
        assert counts.active == pytest.approx(active, rel=within)


GPTOSS = [("gptoss_20b", 32, 32, 2048, 8, 20e9), ("gptoss_120b", 64, 64, 4096, 16, 120e9)]
GROUPED = {"model.layers.attention": "gqa", "model.layers.attention.kv_heads": 8, "model.head": "linear"}
"""The documented overrides: 8 key-value heads and an untied output table."""


@pytest.mark.parametrize(("name", "layers", "heads", "dim", "experts", "stated"), GPTOSS)
def test_gptoss_models_are_those_they_are_named_for(name, layers, heads, dim, experts, stated):
    """Multi-head attention, experts of three matrices of which two are active, one table, and the norms."""
    run = recipe(name)
    block = run.model.layers[0]
    width = block.ffn.expert.hidden_dim
    assert (len(run.model.layers), block.attention, run.model.max_seq_len) == (layers, MHA(heads=heads), 131_072)
    assert width % 128 == 0  # tensor cores, and rows of whole 16 bytes
    table, norms = 200_000 * dim, (2 * layers + 1) * dim
    attention, router, expert = 4 * dim * dim, dim * experts, 3 * dim * width
    counts = count_parameters(run.model)
    assert counts.total == table + norms + layers * (attention + router + experts * expert)
    assert counts.active == table + norms + layers * (attention + router + 2 * expert)
    assert counts.total == pytest.approx(stated, rel=0.02)
    grouped = count_parameters(override(run, GROUPED).model)
    assert counts.total - grouped.total == layers * 2 * dim * (dim - 8 * dim // heads) - table
    assert grouped.total == pytest.approx(stated, rel=0.02)


@pytest.mark.parametrize(("name", "active"), [("openai_gptoss_20b", 3.61e9), ("openai_gptoss_120b", 5.13e9)])
def test_gpt_oss_active(name, active):
    """OpenAI counts the output head and not the input table among the active parameters."""
    counts = count_parameters(recipe(name).model)
    assert counts.active - counts.components["embedding"][1] == pytest.approx(active, rel=0.005)


@pytest.mark.parametrize("path", [p for p in sorted(RECIPES.glob("*.py")) if p.stem != "train"], ids=lambda p: p.stem)
def test_every_recipe_goes_to_yaml_and_back(path):
    run = recipe(path.stem)
    assert run.name == path.stem
    assert Run.from_yaml(run.to_yaml()) == run
