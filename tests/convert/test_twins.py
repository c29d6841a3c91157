"""Our models against transformers' implementations of the same: logits, gradients, tensors and settings."""

import pytest
import torch
from torch.nn import functional

from mosaic_dist.convert.hugging_face import (
    config_from_spec,
    spec_from_config,
    weights_to_hugging_face,
    weights_to_ours,
)
from mosaic_dist.convert.hugging_face.canonical_form import canonical_form, first_difference
from mosaic_dist.spec import override
from tests.convert.twins import TWINS, bare_config, gradients, make_twin, saved_configs, state, tokens, transformers

BOUND = 1e-5
"""Largest difference of logits relative to the largest logit, float32; of a gradient relative to its largest value."""

NOTHING = 1e-7
"""A gradient that is zero on paper: of experts without tokens, and of GPT-2's key bias, which moves all scores of a
query alike. Both sides have rounding errors of some 1e-9 there; other gradients here reach 5e-3 and more."""

# One setting undone in a model that uses it: the comparison must notice, or it would prove nothing about the setting.
UNDONE = [
    ("llama-yarn", {"position.scaling.attention_factor": 1.0}),
    ("llama-yarn", {"position.scaling.beta_fast": 2.0}),
    ("llama-3.1", {"position.scaling.high_frequency_factor": 2.0}),
    ("llama-options", {"norm.eps": 1e-5}),
    ("mixtral-window", {"layers.attention.sliding_window": 10}),
    ("gpt_oss", {"layers[0].attention.sliding_window": 8}),
    ("gpt_oss", {"position.scaling.truncate": True}),
    ("gpt_oss", {"layers.ffn.expert.limit": 1.0}),
    ("qwen3_moe", {"layers[0].ffn.router.normalize": False}),
    ("qwen3_moe-options", {"layers.attention.qk_norm_eps": 1e-6}),
    ("deepseek_v3", {"layers.attention.softmax_scale": 1.0}),
    ("deepseek_v3", {"layers[1].ffn.router.num_groups": 1, "layers[1].ffn.router.topk_groups": 1}),
    ("deepseek_v3-sharp", {"position.scaling.attention_factor": 1.0}),
    ("deepseek_v3-plain", {"layers.ffn.router.scale": 1.0}),
]


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    assert found.shape == right.shape
    return float((found - right).abs().max() / right.abs().max())


def differing(found, right) -> str | None:
    return first_difference(canonical_form(found).to_dict(), canonical_form(right).to_dict())


def ours_from(twin):
    config = twin.config.to_dict()
    model = spec_from_config(config).build().eval()
    missing = model.load_state_dict(dict(weights_to_ours(config, state(twin))), strict=False)
    assert set(missing.missing_keys) <= {"head.weight"}
    assert not missing.unexpected_keys
    return model


@pytest.fixture(scope="module", params=TWINS)
def twin(request):
    torch.set_num_threads(1)
    return make_twin(request.param)


def test_logits_are_the_twins(twin):
    with torch.no_grad():
        right = twin(tokens()).logits
        found = ours_from(twin)(tokens())
    assert right.std() > 0.5  # a model that says nothing would agree with anything
    assert relative(found, right) < BOUND


def test_gradients_are_the_twins(twin):
    twin.zero_grad()
    logits = twin(tokens()).logits
    functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    right = dict(weights_to_ours(twin.config.to_dict(), gradients(twin)))
    model = ours_from(twin)
    scored = tokens().numel() - len(tokens())
    (model(tokens()[:, :-1], tokens()[:, 1:]).cross_entropy_sum / scored).backward()
    for name, parameter in model.named_parameters():
        if float(right[name].abs().max()) < NOTHING:
            assert float(parameter.grad.abs().max()) < NOTHING, name
        else:
            assert relative(parameter.grad, right[name]) < BOUND, name


def test_tensors_survive_both_ways(twin):
    config = twin.config.to_dict()
    spec = spec_from_config(config)
    ours = dict(weights_to_ours(config, state(twin)))
    back = dict(weights_to_hugging_face(spec, ours))
    if config.get("rope_interleave") is False:  # we write the released order, which is the other one
        again = dict(weights_to_ours(config_from_spec(spec), back))
        assert all(torch.equal(again[name], ours[name]) for name in ours)
        return
    assert back.keys() == state(twin).keys()
    for name, values in state(twin).items():
        assert torch.equal(back[name], values), name
        assert back[name].dtype == values.dtype


def test_settings_survive_both_ways(twin):
    spec = spec_from_config(twin.config.to_dict())
    written = config_from_spec(spec)
    assert written["model_type"] == twin.config.model_type
    theirs = transformers.AutoConfig.for_model(**written).to_dict()  # what the transformers at hand makes of it
    for config in (written, theirs):
        assert differing(spec_from_config(config), spec) is None


@pytest.mark.parametrize("name", TWINS)
def test_every_form_of_a_configuration_is_the_same_model(name):
    spec = spec_from_config(bare_config(name))
    for version in ("4.57.1", "5.24.0"):
        assert differing(spec_from_config(saved_configs(version)[name]), spec) is None


@pytest.mark.parametrize(("name", "changes"), UNDONE)
def test_a_wrong_setting_would_be_noticed(name, changes):
    twin = make_twin(name)
    right_model = ours_from(twin)
    wrong_model = override(right_model.spec, changes).build().eval()
    wrong_model.load_state_dict(right_model.state_dict())
    with torch.no_grad():
        assert relative(wrong_model(tokens()), twin(tokens()).logits) > 100 * BOUND
