"""Small random models of transformers, one or more per architecture, with their options on.

`python -m tests.convert.twins` writes their config.json, as the transformers at hand saves them, beside this file.
"""

import copy
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors.torch import load_file

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
    "gpt_oss-absent": ("gpt_oss", GPT_OSS),
    "gpt_oss-plain": (
        "gpt_oss",
        GPT_OSS
        | {"rope_scaling": {"rope_type": "default"}, "attention_bias": False, "tie_word_embeddings": True}
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


def bare_config(name: str) -> dict:
    """A config.json with nothing but the settings above."""
    model_type, settings = TWINS[name]
    return {"model_type": model_type, **settings}


def make_config(name: str):
    """transformers' configuration of a twin."""
    return transformers.AutoConfig.for_model(
        **copy.deepcopy(bare_config(name)), bos_token_id=None, eos_token_id=None, pad_token_id=None
    )


def make_twin(name: str):
    """A model of transformers with large random values everywhere, so that no mistake hides behind a small weight."""
    config = make_config(name)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for kind, values in tensors.items():
            noise = torch.randn(values.shape, generator=generator)
            if kind.endswith("inv_freq"):
                continue
            if kind.endswith("e_score_correction_bias"):
                values.copy_(noise.abs() * 0.2)  # below zero, transformers 4 chooses other groups than the paper
            elif "norm" in kind or ".ln_" in kind:
                values.copy_(1 + 0.3 * noise if kind.endswith("weight") else 0.3 * noise)
            else:
                values.copy_(noise * (0.6 if values.ndim == 1 else 0.25))
    return model


def state(model) -> dict[str, torch.Tensor]:
    """Its tensors as `save_pretrained` writes them; in memory, transformers 5 holds experts stacked."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradients of its parameters, named and laid out as `state`."""
    holder = copy.deepcopy(model)
    for parameter, held in zip(model.parameters(), holder.parameters(), strict=True):
        held.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    return state(holder)


def tokens() -> torch.Tensor:
    return torch.randint(0, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(2))


# --- config.json of every version -----------------------------------------------------------------------------------

SAVED = {version: Path(__file__).parent / f"configs_transformers_{version}.json" for version in ("4.57.1", "5.24.0")}


def saved_configs(version: str) -> dict[str, dict]:
    """config.json of the twins, by name, as this version of transformers saved them."""
    return json.loads(SAVED[version].read_text())


def saved_config(name: str) -> dict:
    """config.json of a twin as the transformers at hand saves it."""
    with tempfile.TemporaryDirectory() as folder:
        make_config(name).save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


if __name__ == "__main__":
    configs = {name: saved_config(name) for name in TWINS}
    SAVED[transformers.__version__].write_text(json.dumps(configs, indent=1) + "\n")
