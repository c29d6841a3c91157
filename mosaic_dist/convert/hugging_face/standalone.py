"""Models without a twin among transformers' architectures: folders that bring their own code.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads them with torch and transformers alone.
Tensors have our names behind `model.`, and config.json holds the spec, so they come back unchanged.
"""

from collections.abc import Iterator
from typing import Any

import torch

from mosaic_dist import __version__
from mosaic_dist.convert.hugging_face.joined import PACKAGE, join_sources
from mosaic_dist.convert.hugging_face.rules import Rule, same
from mosaic_dist.convert.hugging_face.settings import Settings
from mosaic_dist.convert.native import expected_shapes
from mosaic_dist.errors import UserError
from mosaic_dist.model import Transformer
from mosaic_dist.spec import Spec, fields

MODEL_TYPE, CLASS_NAME = "mosaic", "MosaicForCausalLM"
CODE = "modeling_mosaic"

TEMPLATE = "mosaic_dist.convert.hugging_face.standalone_model"
LEFT_OUT = (
    "mosaic_dist.spec.Spec.to_yaml",
    "mosaic_dist.spec.Spec.from_yaml",
    "mosaic_dist.model.transformer.Transformer.validate",
    "mosaic_dist.model.transformer.Transformer.build_initialized",
    "mosaic_dist.model.transformer.Transformer.width_factors",
)
"""What a model that exists has no use for, and what would bring yaml, xxhash and every kind of part along."""

HEADER = """\
# Written by mosaic_dist {version}: the code of the one model in this folder, joined from mosaic_dist's own modules.
# Load the folder with transformers' AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).
# Needs Python 3.11, torch 2.11 and transformers 4.57 or later, and nothing of mosaic_dist.
# SPDX-License-Identifier: Apache-2.0
"""


def read(settings: Settings) -> Transformer:
    """The spec in config.json; UserError where the settings beside it tell of another model."""
    spec = Transformer.from_dict(settings.take("mosaic"))
    for key, value in _frame(spec).items():
        settings.expect(key, value)
    return spec


def write(spec: Transformer) -> dict[str, Any]:
    """The inverse: config.json without the tokens, for the spec as it is."""
    code = {"AutoConfig": f"{CODE}.MosaicConfig", "AutoModelForCausalLM": f"{CODE}.{CLASS_NAME}"}
    frame = {"model_type": MODEL_TYPE, "architectures": [CLASS_NAME], "auto_map": code}
    return frame | _frame(spec) | {"use_cache": False, "mosaic": spec.to_dict()}


def _frame(spec: Transformer) -> dict[str, Any]:
    """What tools look for in a config.json, whatever the model."""
    with torch.device("meta"):
        model = spec.build()
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "max_position_embeddings": spec.max_seq_len,
        "num_hidden_layers": len(spec.layers),
        "tie_word_embeddings": model.head.weight is model.embedding.weight,
    }


def rules(spec: Transformer, config: dict[str, Any]) -> Iterator[Rule]:
    """Every tensor as it is."""
    return (same(name, f"model.{name}") for name in expected_shapes(spec))


def source_code(spec: Transformer) -> str:
    """The Python file that goes into the folder: transformers' classes, and the parts that this model is made of."""
    parts = sorted((cls.__module__, cls.__name__) for cls in _classes(spec))
    for module, name in parts:
        if module.split(".")[0] != PACKAGE:
            raise UserError(f"{name} is of {module}; only models made of {PACKAGE}'s own parts can be exported")
    roots = [*parts, (TEMPLATE, "MosaicConfig"), (TEMPLATE, CLASS_NAME)]
    return HEADER.format(version=__version__) + "\n" + join_sources(roots, LEFT_OUT)


def _classes(spec: Spec) -> set[type[Spec]]:
    """The classes of a spec and of all specs in it."""
    found = {type(spec)}
    for name in fields(type(spec)):
        value = getattr(spec, name)
        for part in value if isinstance(value, tuple) else (value,):
            found |= _classes(part) if isinstance(part, Spec) else set()
    return found
