"""config.json in the forms of transformers 4 and 5: absent keys, keys of both, keys without effect."""

import copy
import warnings

import pytest

from mosaic_dist.convert.hugging_face import ARCHITECTURES, config_from_spec, spec_from_config
from mosaic_dist.convert.hugging_face.canonical_form import canonical_form
from mosaic_dist.errors import UserError
from mosaic_dist.model import YaRN
from tests.convert.twins import (
    DEEPSEEK,
    FEW_TURNS,
    GPT_OSS,
    LLAMA,
    MIXTRAL,
    QWEN,
    SAVED,
    TWINS,
    YARN,
    saved_config,
    saved_configs,
    transformers,
)

VERSION = transformers.__version__
DERIVED = {"head_dim", "num_key_value_heads", "layer_types", "mlp_only_layers", "sliding_window", "rope_parameters"}
"""Defaults of our tables that are None, or that transformers writes after it has worked them out."""

SIZES = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61}
MORE = {"rms_norm_eps": 1e-3, "tie_word_embeddings": True, "rope_scaling": YARN} | FEW_TURNS
# Settings other than the defaults, which build a model without any one of them
SETTINGS = {
    "gpt2": {"vocab_size": 61, "n_embd": 96, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_inner": 40}
    | {"layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    "llama": LLAMA | SIZES | MORE | {"attention_bias": True, "mlp_bias": True},
    "mixtral": MIXTRAL | SIZES | MORE | {"num_experts_per_tok": 3, "sliding_window": 9},
    "qwen3_moe": QWEN
    | SIZES
    | MORE
    | {"attention_bias": True, "norm_topk_prob": True, "mlp_only_layers": [1], "decoder_sparse_step": 2}
    | {"use_sliding_window": True, "sliding_window": 9, "num_experts": 12},
    "gpt_oss": GPT_OSS | SIZES | MORE | {"layer_types": 4 * ["sliding_attention"], "num_local_experts": 6},
    "deepseek_v3": DEEPSEEK
    | MORE
    | {"num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 16, "topk_group": 3}
    | {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
}
REFUSED = {
    "llama": {"factor"},
    "mixtral": {"factor"},
    "qwen3_moe": {"factor"},
    "gpt_oss": {"factor", "num_hidden_layers"},  # of which there are four types
    "deepseek_v3": {"factor", "num_attention_heads", "num_key_value_heads"},  # the other one is 128 by default
}
"""Keys without which neither side has a model. A rotary `rope_type` is the default's then, which takes no factor."""


def model(config):
    """What a config.json describes, for comparisons; None if it is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return canonical_form(spec_from_config(config))
    except UserError:
        return None


def theirs(config):
    """The same, with all that transformers fills in."""
    try:
        return model(transformers.AutoConfig.for_model(**copy.deepcopy(config)).to_dict())
    except Exception:
        return None


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_absent_key_means_what_transformers_takes_it_for(model_type):
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(SETTINGS[model_type])).to_dict()
    for derived in ("head_dim", "qk_head_dim") if model_type == "deepseek_v3" else ():
        del config[derived]  # published ones do not have them, and they would contradict other widths
    assert model(config) is not None
    without = {key: {k: v for k, v in config.items() if k != key} for key in config if key != "model_type"}
    rope = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    for key in config.get(rope) or {}:
        without[key] = config | {rope: {k: v for k, v in config[rope].items() if k != key}}
    refused = set()
    for key, changed in without.items():
        found = model(changed)
        assert found == theirs(changed), key
        refused |= {key} if found is None else set()
    assert refused - {"rope_type"} == REFUSED.get(model_type, set())
    bare = {"model_type": model_type, **SETTINGS[model_type]}  # the form of transformers 4, which 5 reads too
    for key in bare.keys() - {"model_type"}:
        changed = {k: v for k, v in bare.items() if k != key}
        assert model(changed) == theirs(changed), key


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_tables_are_transformers_defaults(model_type):
    config = transformers.AutoConfig.for_model(model_type).to_dict()
    known = ARCHITECTURES[model_type].known.defaults
    for key in (known.keys() & config.keys()) - DERIVED:
        assert known[key] == config[key], key
    assert model(config) == model({"model_type": model_type}) != None  # noqa: E711 - and every key is accounted for


@pytest.mark.skipif(VERSION not in SAVED, reason="no configurations were kept of this version")
@pytest.mark.parametrize("name", TWINS)
def test_the_configurations_kept_are_what_is_saved(name):
    assert saved_configs(VERSION)[name] == saved_config(name)


@pytest.mark.parametrize(
    ("version", "factor"), [("4.57.1", None), ("5.24.0", 32.0)], ids=["transformers 4", "transformers 5"]
)
def test_null_scaling_of_gpt_oss_means_what_its_version_takes_it_for(version, factor):
    config = {"model_type": "gpt_oss", **GPT_OSS, "rope_scaling": None}
    scaling = spec_from_config(config | {"transformers_version": version}).position.scaling
    assert (scaling.factor if isinstance(scaling, YaRN) else scaling) == factor
    if VERSION.split(".")[0] == version.split(".")[0]:
        assert model(config | {"transformers_version": version}) == theirs(config)
    with pytest.raises(UserError, match="means no scaling to transformers 4 and YaRN to transformers 5"):
        spec_from_config(config)


def test_the_clamps_of_gpt_oss_are_settings_since_transformers_5_19():
    config = {"model_type": "gpt_oss", **GPT_OSS, "swiglu_limit": 5.0, "swiglu_alpha": 1.5}
    spec = spec_from_config(config | {"transformers_version": "5.24.0"})
    assert (spec.layers[0].ffn.expert.limit, spec.layers[0].ffn.expert.alpha) == (5.0, 1.5)
    for version in ("4.57.1", "5.18.0"):
        with pytest.raises(UserError, match=r"swiglu_limit = 5.0 cannot be represented"):
            spec_from_config(config | {"transformers_version": version})
    with pytest.raises(UserError, match=r"gpt_oss: layers\[0\].ffn.expert.limit is 5.0, and would be 7.0"):
        config_from_spec(spec)  # transformers 4 would take 7


THETA = {"rope_theta": 500.0, "rope_scaling": YARN}
BOTH = THETA | {"rope_parameters": {"rope_theta": 500.0, **YARN}}


def test_rotary_settings_of_both_forms_have_to_agree():
    llama = {"model_type": "llama", **LLAMA}
    new = {"rope_parameters": BOTH["rope_parameters"]}
    assert model(llama | THETA) == model(llama | BOTH) == model(llama | new) != model(llama)
    assert model(llama | new | {"rope_theta": 500.0}) == model(llama | new)
    for key, value in (("rope_theta", 501.0), ("rope_scaling", YARN | {"factor": 2.0}), ("rope_parameters", {})):
        with pytest.raises(UserError, match="which is another model; remove the wrong ones"):
            spec_from_config(llama | BOTH | {key: value})
    with pytest.raises(UserError, match="which is another model; remove the wrong ones"):
        spec_from_config(llama | new | {"rope_theta": 501.0})
    with pytest.raises(UserError, match=r"rope_theta is 10000.0, and 500.0 in rope_scaling"):
        spec_from_config(llama | {"rope_scaling": YARN | {"rope_theta": 500.0}})
    with pytest.raises(UserError, match="rope_type = 'yarn' and type = 'linear' differ"):
        spec_from_config(llama | {"rope_scaling": YARN | {"type": "linear"}})


def test_experts_of_qwen_under_both_names():
    qwen = {"model_type": "qwen3_moe", **QWEN}
    assert model(qwen | {"num_local_experts": 6}) == model(qwen)
    with pytest.raises(UserError, match="num_experts = 6 cannot be represented here; only 8"):
        spec_from_config(qwen | {"num_local_experts": 8})


PUBLISHED = {  # keys of published configurations that transformers does not read
    "llama": {"is_llama_config": True, "rope_interleaved": False},
    "qwen3_moe": {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0},
    "deepseek_v3": {"num_nextn_predict_layers": 1},
}
PLAIN = {"llama": LLAMA, "qwen3_moe": QWEN, "deepseek_v3": DEEPSEEK}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_keys_without_effect_are_warned_about(model_type):
    config = {"model_type": model_type, **PLAIN[model_type]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = spec_from_config(config)
    told = ", ".join(f"{key} = {value!r}" for key, value in PUBLISHED[model_type].items())
    with pytest.warns(UserWarning, match=f"without effect on this model, ignored: {told}"):
        assert spec_from_config(config | PUBLISHED[model_type]) == plain


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("llama", "rope_interleaved", True),
        ("llama", "qkv_bias", False),
        ("qwen3_moe", "qkv_bias", True),
        ("qwen3_moe", "shared_expert_intermediate_size", 24),
        ("deepseek_v3", "head_dim", 4),
    ],
)
def test_other_keys_and_other_values_are_refused(model_type, key, value):
    with pytest.raises(UserError, match=f"{key} = {value!r} .*cannot be represented"):
        spec_from_config({"model_type": model_type, **PLAIN[model_type], key: value})


@pytest.mark.parametrize("model_type", ["gpt_neox", "mamba", "qwen3", "mistral"])
def test_no_other_architecture_is_offered(model_type):
    with pytest.raises(UserError, match=f"no model_type '{model_type}' can be converted; only deepseek_v3, gpt2,"):
        spec_from_config({"model_type": model_type})
