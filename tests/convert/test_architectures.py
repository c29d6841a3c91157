"""Published configurations and our recipes, as each other; and what has no Hugging Face form."""

import contextlib
import dataclasses

import gpt2_reference
import mosaic_small
import nano_modern
import openai_gptoss_20b
import openai_gptoss_120b
import pytest

from mosaic_dist.convert.hugging_face import ARCHITECTURES, config_from_spec, spec_from_config
from mosaic_dist.convert.hugging_face.canonical_form import canonical_form
from mosaic_dist.convert.hugging_face.standalone import source_code
from mosaic_dist.errors import UserError
from mosaic_dist.model import GQA, Block, NTKScaling, RMSNorm, RoPE, SwiGLU, Transformer, Untied, count_parameters

GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": 12 * ["sliding_attention", "full_attention"],
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}

DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
}

MIXTRAL_8X7B = LLAMA_2_7B | {
    "model_type": "mixtral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}

SMALL_LLAMA = Transformer(
    vocab_size=100,
    dim=32,
    max_seq_len=64,
    position=RoPE(),
    layers=2 * (Block(attention=GQA(heads=4, kv_heads=2), ffn=SwiGLU(hidden_dim=32)),),
    norm=RMSNorm(),
    head=Untied(),
)


@pytest.mark.parametrize(
    ("config", "total"),
    [(LLAMA_2_7B, 6_738_415_616), (MIXTRAL_8X7B, 46_702_792_704), (GPT_OSS_20B, 20_914_757_184)],
)
def test_published_counts(config, total):
    assert count_parameters(spec_from_config(config)).total == total


def test_deepseek_v3_has_671_billion_parameters_of_which_37_act():
    counts = count_parameters(spec_from_config(DEEPSEEK_V3))
    assert round(counts.total / 1e9) == 671
    assert 36.5e9 < counts.active < 38e9  # "37B"; with the embedding counted, 37.6


def test_published_gpt_oss_is_the_recipe():
    assert canonical_form(spec_from_config(GPT_OSS_20B)) == canonical_form(openai_gptoss_20b.run.model)


@pytest.mark.parametrize(
    ("recipe", "model_type"),
    [
        (gpt2_reference, "gpt2"),
        (nano_modern, "llama"),
        (openai_gptoss_20b, "gpt_oss"),
        (openai_gptoss_120b, "gpt_oss"),
    ],
)
def test_recipes_with_a_twin(recipe, model_type):
    config = config_from_spec(recipe.run.model)
    assert config["model_type"] == model_type
    assert canonical_form(spec_from_config(config)) == canonical_form(recipe.run.model)


def test_a_model_without_twin_is_refused_with_a_reason_per_architecture():
    with pytest.raises(UserError, match="no Hugging Face architecture computes this model") as refused:
        config_from_spec(mosaic_small.run.model)
    told = str(refused.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in told] == list(ARCHITECTURES)
    assert told[-1].endswith("layers[0].ffn.router is 'softmax_top_k', not 'sigmoid_top_k'")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"position": RoPE(scaling=NTKScaling(factor=2.0))}, "llama: position.scaling is 'ntk'"),
        (
            {"layers": (*SMALL_LLAMA.layers, Block(attention=GQA(heads=4, kv_heads=4), ffn=SwiGLU(hidden_dim=32)))},
            r"llama: layers\[2\].attention.kv_heads is 4, and would be 2",
        ),
        (
            {
                "layers": (
                    Block(
                        attention=GQA(heads=4, kv_heads=4, logit_softcap=3.0, kernel="explicit"),
                        ffn=SwiGLU(hidden_dim=4),
                    ),
                )
            },
            r"llama: layers\[0\].attention.logit_softcap is 3.0, and would be None",
        ),
    ],
)
def test_what_an_architecture_cannot_say_is_told(change, reason):
    assert config_from_spec(SMALL_LLAMA)["model_type"] == "llama"
    with pytest.raises(UserError, match=reason):
        config_from_spec(dataclasses.replace(SMALL_LLAMA, **change))


def test_dropout_is_the_runs_and_plays_no_part():
    blocks = tuple(dataclasses.replace(block, dropout=0.1) for block in SMALL_LLAMA.layers)
    assert config_from_spec(dataclasses.replace(SMALL_LLAMA, layers=blocks)) == config_from_spec(SMALL_LLAMA)


class OtherBlock(Block, type="test_other_block"):
    """Like `Block` in all that an architecture asks for."""


def test_a_block_of_another_kind_has_no_twin():
    blocks = tuple(OtherBlock(attention=block.attention, ffn=block.ffn) for block in SMALL_LLAMA.layers)
    spec = dataclasses.replace(SMALL_LLAMA, layers=blocks)
    with pytest.raises(UserError, match=r"llama: layers\[0\].type is 'test_other_block', and would be 'prenorm'"):
        config_from_spec(spec)
    with pytest.raises(UserError, match="only models made of mosaic_dist's own parts"):
        source_code(spec)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LLAMA_2_7B | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "type 'dynamic' cannot be represented",
        ),
        (LLAMA_2_7B | {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}}, "rope_scaling: x = 1 is"),
        (LLAMA_2_7B | {"hidden_act": "gelu"}, "hidden_act = 'gelu' cannot be represented here; only 'silu'"),
        (LLAMA_2_7B | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (MIXTRAL_8X7B | {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        (GPT_OSS_20B | {"layer_types": ["full_attention"]}, "layer_types = .* should be 24"),
        (GPT_OSS_20B | {"swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
        (DEEPSEEK_V3 | {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        (DEEPSEEK_V3 | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_settings_that_cannot_be_represented_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        spec_from_config(config)


@pytest.mark.parametrize("config", [LLAMA_2_7B, MIXTRAL_8X7B, GPT_OSS_20B, DEEPSEEK_V3])
@pytest.mark.parametrize("value", ["x", -1, [1], {"a": 1}])
def test_values_of_a_wrong_kind_are_told_and_never_crash(config, value):
    for key in config:
        with contextlib.suppress(UserError):  # any other exception fails the test
            spec_from_config(config | {key: value, "num_hidden_layers": value if key == "num_hidden_layers" else 1})
