"""What is trained: the recipes at a size that fits, and the model of `transformers` that computes the same."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosaic_dist.convert.hugging_face import config_from_spec, weights_to_hugging_face
from mosaic_dist.model import MoE, RoPE, SigmoidTopK, SwiGLU, Table, Transformer
from mosaic_dist.plan.command import load_recipe
from mosaic_dist.run_spec import Run
from mosaic_dist.spec import leaves, override

ROUND_VOCABULARY = 64
NARROWED = {"dim", "hidden_dim", "heads", "kv_heads", "kv_compression_dim"}
"""Fields that `Size.narrow` divides; a width of heads stays, so attention keeps its form."""


class Size(NamedTuple):
    """How much of a recipe is trained. 0 is the recipe's own number."""

    layers: int = 0
    """The first ones; the vocabulary shrinks by the same factor, so that its share of the work stays the recipe's."""
    seq_len: int = 0
    micro_batch_size: int = 0
    narrow: int = 1
    """Divides all widths."""


CPU = Size(layers=2, seq_len=512, micro_batch_size=4)
TINY = Size(layers=1, seq_len=16, micro_batch_size=2, narrow=4)
SIZES: dict[str, dict[str, Size]] = {
    "tiny": {
        "gpt2_reference": TINY,
        "mosaic_small": TINY,
        "mosaic_dense": TINY,
        "nano_moe": TINY,
        "t4_moe": TINY,
        "gptoss_20b": TINY._replace(narrow=16),
    },
    "cpu": {
        "gpt2_reference": CPU,
        "mosaic_small": CPU,
        "mosaic_dense": CPU,
        "nano_moe": CPU,
        "t4_moe": CPU,
        "gptoss_20b": CPU._replace(narrow=4),
    },
    "full": {
        "gpt2_reference": Size(),
        "mosaic_small": Size(),
        "mosaic_dense": Size(),
        "nano_moe": Size(),
        "t4_moe": Size(),
        "gptoss_20b": Size(layers=2),
    },
}


class Case(NamedTuple):
    """A run whose one step is one micro-batch, and its twin in `transformers`."""

    recipe: str
    run: Run
    config: dict[str, Any]
    """config.json of the twin."""
    said: str
    """What was changed for there to be a twin."""

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.run.batch_tokens

    def twin_weights(self) -> dict[str, Tensor]:
        """The initial weights of our model under the twin's names."""
        model = self.run.model.build_initialized(self.run.seed)
        ours = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        if self.config["model_type"] == GRANITE:
            return dict(_granite_weights(len(self.run.model.layers), ours))
        return dict(weights_to_hugging_face(self.run.model, ours, self.config))


def make_case(recipe: str, size: Size) -> Case:
    """A recipe at a size."""
    run = load_recipe(f"recipes/{recipe}.py")
    change, config, said = TWINS[recipe]
    model = change(_cut(run.model, size))
    seq_len, micro_batch_size = size.seq_len or run.seq_len, size.micro_batch_size or run.micro_batch_size
    data = dataclasses.replace(run.data, seq_len=seq_len)
    run = dataclasses.replace(
        run, model=model, data=data, batch_tokens=seq_len * micro_batch_size, micro_batch_size=micro_batch_size
    )
    return Case(recipe, run, config(model), said)


def _cut(model: Transformer, size: Size) -> Transformer:
    share = (size.layers or len(model.layers)) / len(model.layers) / size.narrow
    if share == 1:
        return model
    model = dataclasses.replace(model, layers=model.layers[: size.layers or None])
    narrowed = {
        path: max(1, value // size.narrow)
        for path, value in leaves(model)
        if path.rpartition(".")[2] in NARROWED and not path.startswith("position") and isinstance(value, int)
    }
    return override(
        model, {**narrowed, "vocab_size": math.ceil(model.vocab_size * share / ROUND_VOCABULARY) * ROUND_VOCABULARY}
    )


# --- twins --------------------------------------------------------------------------------------------------------


def _as_it_is(model: Transformer) -> Transformer:
    return model


def _with_sigmoid_router(model: Transformer) -> Transformer:
    return override(model, {"layers.ffn.router": SigmoidTopK().to_dict()})


def _with_table_and_rope(model: Transformer) -> Transformer:
    return dataclasses.replace(model, embedding=Table(), position=RoPE())


def _dense_deepseek(model: Transformer) -> dict[str, Any]:
    """DeepSeek-V3 may begin with dense layers; here it has no others."""
    block: Any = model.layers[0]
    mixture = MoE(expert=SwiGLU(hidden_dim=block.ffn.hidden_dim), experts=1, top_k=1, router=SigmoidTopK())
    last = dataclasses.replace(block, ffn=mixture)
    config = config_from_spec(dataclasses.replace(model, layers=(*model.layers, last)))
    return config | {"num_hidden_layers": len(model.layers)}


GRANITE = "granitemoeshared"


def _granite(model: Transformer) -> dict[str, Any]:
    """The one architecture with softmax routing and a shared expert without a gate; its multipliers are all one."""
    block: Any = model.layers[0]
    width, position = block.ffn.expert.hidden_dim // block.ffn.split, model.position
    assert isinstance(position, RoPE)
    return {
        "model_type": GRANITE,
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": width,
        "shared_intermediate_size": width * block.ffn.shared_experts,
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": block.attention.heads,
        "num_key_value_heads": block.attention.key_value_heads(),
        "attention_multiplier": (model.dim // block.attention.heads) ** -0.5,
        "num_local_experts": block.ffn.experts,
        "num_experts_per_tok": block.ffn.top_k,
        "max_position_embeddings": model.max_seq_len,
        "rope_theta": position.theta,
        "rms_norm_eps": model.norm.eps,  # type: ignore[attr-defined]
        "tie_word_embeddings": True,
    }


def _granite_weights(layers: int, ours: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield "model.embed_tokens.weight", ours["embedding.weight"]
    yield "model.norm.weight", ours["norm.weight"]
    for i in range(layers):
        here, there = f"layers.{i}", f"model.layers.{i}"
        yield f"{there}.input_layernorm.weight", ours[f"{here}.attention_norm.weight"]
        yield f"{there}.post_attention_layernorm.weight", ours[f"{here}.ffn_norm.weight"]
        for mine, other in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            yield f"{there}.self_attn.{other}_proj.weight", ours[f"{here}.attention.{mine}.weight"]
        yield f"{there}.block_sparse_moe.router.layer.weight", ours[f"{here}.ffn.router.weight"]
        stacks = [ours[f"{here}.ffn.experts.{name}.weight"].mT for name in ("gate", "up", "down")]
        yield f"{there}.block_sparse_moe.input_linear.weight", torch.cat(stacks[:2], 1)
        yield f"{there}.block_sparse_moe.output_linear.weight", stacks[2]
        shared = [ours[f"{here}.ffn.shared.{name}.weight"] for name in ("gate", "up", "down")]
        yield f"{there}.shared_mlp.input_linear.weight", torch.cat(shared[:2], 0)
        yield f"{there}.shared_mlp.output_linear.weight", shared[2]


class Twin(NamedTuple):
    """How a recipe gets a model of `transformers` that computes the same."""

    change: Callable[[Transformer], Transformer]
    config: Callable[[Transformer], dict[str, Any]]
    said: str


TWINS = {
    "gpt2_reference": Twin(_as_it_is, config_from_spec, ""),
    "mosaic_small": Twin(_with_sigmoid_router, config_from_spec, "with DeepSeek-V3's router"),
    "mosaic_dense": Twin(_as_it_is, _dense_deepseek, ""),
    "nano_moe": Twin(_as_it_is, _granite, ""),
    "t4_moe": Twin(_with_table_and_rope, config_from_spec, "with a whole embedding table and rotary positions"),
    "gptoss_20b": Twin(_as_it_is, config_from_spec, ""),
}
