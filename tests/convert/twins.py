"""Small random models of transformers, one or more per architecture, with their options on."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

transformers = pytest.importorskip("transformers")

WORDS, CONTEXT, LENGTH = 61, 64, 40
SMALL = {"vocab_size": WORDS, "hidden_size": 32, "max_position_embeddings": CONTEXT, "num_attention_heads": 4}
LLAMA = SMALL | {"intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 0.6}
FEW_TURNS = {"rope_theta": 100.0}  # so that the ramps of the scalings lie among the few pairs of a small head
MIXTRAL = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
GPT_OSS = MIXTRAL | {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 7, "rms_norm_eps": 1e-5}
QWEN = LLAMA | {"num_hidden_layers": 3, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
DEEPSEEK = SMALL | {
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}

# name: (model type, settings)
TWINS = {
    "gpt2": ("gpt2", {"vocab_size": WORDS, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": CONTEXT}),
    "gpt2-untied": (
        "gpt2",
        {"vocab_size": WORDS, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": CONTEXT, "n_inner": 40}
        | {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    ),
    "llama": ("llama", LLAMA),
    "llama-options": (
        "llama",
        LLAMA
        | {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True, "rope_theta": 500.0}
        | {"rms_norm_eps": 1e-2},
    ),
    "llama-linear": ("llama", LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": ("llama", LLAMA | FEW_TURNS | {"rope_scaling": YARN}),
    "llama-3.1": (
        "llama",
        LLAMA
        | FEW_TURNS
        | {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 128,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral-window": ("mixtral", MIXTRAL | {"sliding_window": 9, "num_experts_per_tok": 3, "head_dim": 6}),
    "gpt_oss": ("gpt_oss", GPT_OSS | FEW_TURNS | {"rope_scaling": YARN | {"truncate": False}}),
    "gpt_oss-plain": (
        "gpt_oss",
        GPT_OSS
        | {"rope_scaling": None, "attention_bias": False, "tie_word_embeddings": True}
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "qwen3_moe": ("qwen3_moe", QWEN | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe-options": (
        "qwen3_moe",
        QWEN
        | {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 9, "rms_norm_eps": 1e-2}
        | {"attention_bias": True, "head_dim": 12},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        DEEPSEEK | FEW_TURNS | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek_v3-plain": (
        "deepseek_v3",
        DEEPSEEK
        | {"q_lora_rank": None, "rope_interleave": False, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
        | {"routed_scaling_factor": 1.5, "first_k_dense_replace": 0, "tie_word_embeddings": True},
    ),
    "deepseek_v3-sharp": (
        "deepseek_v3",
        DEEPSEEK | FEW_TURNS | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}, "n_shared_experts": 1},
    ),
}


def make_twin(name: str):
    """A model of transformers with large random values everywhere, so that no mistake hides behind a small weight."""
    model_type, settings = TWINS[name]
    config = transformers.AutoConfig.for_model(
        model_type, **settings, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for kind, values in state(model).items():
            noise = torch.randn(values.shape, generator=generator)
            if kind.endswith("e_score_correction_bias"):
                values.copy_(noise.abs() * 0.2)  # transformers' group choice differs from the paper's below zero
            elif "norm" in kind or ".ln_" in kind:
                values.copy_(1 + 0.3 * noise if kind.endswith("weight") else 0.3 * noise)
            else:
                values.copy_(noise * (0.6 if values.ndim == 1 else 0.25))
    return model


def state(model) -> dict[str, torch.Tensor]:
    """Its tensors as a file holds them: tied ones once."""
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def tokens() -> torch.Tensor:
    return torch.randint(0, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(2))
