"""The architectures that we can read and write, and the four maps between them and ours."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic_dist.convert.hugging_face import deepseek_v3, gpt2, gpt_oss, llama, mixtral, qwen3_moe, standalone
from mosaic_dist.convert.hugging_face.canonical_form import Misfit, canonical_form, first_difference
from mosaic_dist.convert.hugging_face.rules import Rule, to_ours, to_theirs
from mosaic_dist.convert.hugging_face.settings import NOTHING_KNOWN, Known, Settings
from mosaic_dist.convert.native import expected_shapes
from mosaic_dist.errors import UserError
from mosaic_dist.model import Tied, Transformer
from mosaic_dist.spec import SpecError


class Architecture(NamedTuple):
    """One of transformers' model types. A new one is one file with what is named here, and one line below."""

    class_name: str
    known: Known
    read: Callable[[Settings], Transformer]
    write: Callable[[Transformer], dict[str, Any]]
    """From the canonical spec. It may leave out what the architecture lacks: `config_from_spec` reads it back."""
    rules: Callable[[Transformer, dict[str, Any]], Iterator[Rule]]


ARCHITECTURES = {
    name: Architecture(class_name, module.KNOWN, module.read, module.write, module.rules)
    for name, class_name, module in (
        ("gpt2", "GPT2LMHeadModel", gpt2),
        ("llama", "LlamaForCausalLM", llama),
        ("mixtral", "MixtralForCausalLM", mixtral),
        ("qwen3_moe", "Qwen3MoeForCausalLM", qwen3_moe),
        ("gpt_oss", "GptOssForCausalLM", gpt_oss),
        ("deepseek_v3", "DeepseekV3ForCausalLM", deepseek_v3),
    )
}
"""Those whose code is transformers' own, in the order in which they are tried."""

STANDALONE = Architecture(standalone.CLASS_NAME, NOTHING_KNOWN, standalone.read, standalone.write, standalone.rules)
"""Any model, with its own code."""

GPT2_MASKS = (".attn.bias", ".attn.masked_bias")
"""Causal masks that old versions of transformers saved with GPT-2's weights."""


def spec_from_config(config: dict[str, Any]) -> Transformer:
    """The model that a config.json describes; UserError for a model type or a setting that we cannot represent.

    An absent key stands for the architecture's default. Settings without effect are warned about. Dropout, initial
    values and the factors of auxiliary losses are the training's and are not carried over.
    """
    architecture = _architecture(config)
    settings = Settings(config, architecture.known)
    try:
        spec = architecture.read(settings)
        settings.finish()
        expected_shapes(spec)  # parts that do not fit are refused here
    except SpecError as error:
        raise UserError(f"config.json describes no model that can be built: {error}") from None
    return spec


def config_from_spec(spec: Transformer) -> dict[str, Any]:
    """The config.json of the architecture that computes the same logits; UserError with the reasons if there is none.

    An architecture fits when the model that its config.json describes is this one.
    """
    reasons = []
    plain = canonical_form(spec)
    for model_type, architecture in ARCHITECTURES.items():
        try:
            written = {
                "model_type": model_type,
                "architectures": [architecture.class_name],
                **architecture.write(plain),
            }
            difference = first_difference(plain.to_dict(), canonical_form(spec_from_config(written)).to_dict())
            if difference is None:
                return written
            reasons.append(f"{model_type}: {difference}")
        except UserError as error:
            reasons.append(f"{model_type}: {error}")
    raise Misfit("no Hugging Face architecture computes this model:\n  " + "\n  ".join(reasons))


def config_for(spec: Transformer) -> dict[str, Any]:
    """`config_from_spec` where there is such an architecture, else that of a model with its own code."""
    try:
        return config_from_spec(spec)
    except Misfit:
        return STANDALONE.write(spec)


def why_no_architecture(spec: Transformer) -> str:
    """For a model that `config_for` gives its own code: the part that does not fit, of each architecture."""
    try:
        config_from_spec(spec)
    except Misfit as misfit:
        return str(misfit)
    raise AssertionError("an architecture computes this model")


def weights_to_ours(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's tensors as ours, in the dtype that they have; memory is bounded by one layer's stack of experts.

    `tensors` may load lazily. UserError, at once, if some are missing or left over, and when one has another shape.
    """
    spec = spec_from_config(config)
    tensors = _Usable(config, spec, tensors)
    rules = list(_architecture(config).rules(spec, config))
    return to_ours(rules, expected_shapes(spec), tensors)


def weights_to_hugging_face(
    spec: Transformer, tensors: Mapping[str, Tensor], config: dict[str, Any] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors as those of `config`, which describes `spec` and is `config_from_spec`'s unless given.

    Otherwise as `weights_to_ours`; they are exact inverses of each other.
    """
    config = config_from_spec(spec) if config is None else config
    rules = list(_architecture(config).rules(spec, config))
    return to_theirs(rules, expected_shapes(spec), tensors)


def _architecture(config: dict[str, Any]) -> Architecture:
    model_type = str(config.get("model_type"))
    known = ARCHITECTURES | {standalone.MODEL_TYPE: STANDALONE}
    if model_type not in known:
        raise UserError(  # without the nearest name, which would be another architecture's
            f"config.json: no model_type {model_type!r} can be converted; only {', '.join(sorted(known))}"
        )
    return known[model_type]


class _Usable(Mapping[str, Tensor]):
    """Tensors of a checkpoint under the names that the rules know, without those that the model does not have."""

    def __init__(self, config: dict[str, Any], spec: Transformer, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self.names = {name: name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
        if config["model_type"] == "deepseek_v3":
            self.names = {name: name for name in self.names if not deepseek_v3.is_prediction_layer(name, config)}
        embedding = "model.embed_tokens.weight"
        if config["model_type"] == "gpt2":
            embedding = "transformer.wte.weight"
            self.names = {_gpt2_name(name): name for name in self.names if not name.endswith(GPT2_MASKS)}
        if isinstance(spec.head, Tied) and "lm_head.weight" in self.names and embedding in self.names:
            head, table = tensors[self.names.pop("lm_head.weight")], tensors[self.names[embedding]]
            if not torch.equal(head, table):
                raise UserError("config.json ties lm_head.weight to the embedding, but the two tensors differ")

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _gpt2_name(name: str) -> str:
    """The released files are of the model without its head, whose names have no prefix."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
