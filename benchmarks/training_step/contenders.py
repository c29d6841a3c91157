"""Who trains: our engine, `transformers` and AutoEP under DeepSpeed, and a loop in plain PyTorch."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import deepspeed
import torch
import transformers as hugging_face
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.moe_layer import Size as LayerSize
from benchmarks.moe_layer import make_autoep
from benchmarks.training_step.cases import Case
from benchmarks.training_step.plain_gpt2 import PlainGPT2
from mosaic_dist.model import count_parameters
from mosaic_dist.optim import AdamW
from mosaic_dist.parallel import Engine, World, read_config
from mosaic_dist.parallel.engine import split_expert_groups

Precision = Literal["fp32", "bf16"]
DS_CONFIG = "ds_configs/zero1.json"
"""Of all who train under DeepSpeed."""


class Contender(NamedTuple):
    """A model in training: `step` does forward, loss, backward, clipping and update, and returns the loss."""

    step: Callable[[Tensor, Tensor], float]
    parameters: int
    engine: Engine | None = None
    """Ours."""


class Peer(nn.Module):
    """A model of `transformers` with the loss at its end."""

    def __init__(self, case: Case):
        super().__init__()
        # contiguous and of its own, as from a file: the model keeps the tensors that it is given
        form = torch.contiguous_format
        weights = {name: weight.clone(memory_format=form) for name, weight in case.twin_weights().items()}
        (name,) = case.config["architectures"]
        model, found = getattr(hugging_face, name).from_pretrained(
            None,
            config=hugging_face.AutoConfig.for_model(
                **case.config, bos_token_id=None, eos_token_id=None, pad_token_id=None
            ),
            state_dict=weights,  # named as in files: version 5 stacks the experts and multiplies in groups
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        assert not found["missing_keys"], found
        assert not found["unexpected_keys"], found
        self.model = model.train()

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The mean cross-entropy."""
        logits_BTV = self.model(input_ids=tokens_BT, use_cache=False).logits
        return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


class AutoEPBlock(nn.Module):
    """DeepSpeed's AutoEP layer in the place of Mixtral's block."""

    def __init__(self, layer: nn.Module, with_logits: bool):
        super().__init__()
        self.layer, self.with_logits = layer, with_logits

    def forward(self, x_BTD: Tensor) -> Tensor | tuple[Tensor, None]:
        """x_BTD -> [B, T, D]; with a place for the router's logits, which transformers 4 unpacks and does not use."""
        out = self.layer(x_BTD)
        out = out[0] if isinstance(out, tuple) else out
        return (out, None) if self.with_logits else out


def ours(case: Case, precision: Precision, world: World) -> Contender:
    """The recipe's model through our engine."""
    run = case.run
    engine = Engine(run.model, run.optimizer, _config(case, precision), 1, run.seed, world, parallel=run.parallel)

    def step(tokens_BT: Tensor, targets_BT: Tensor) -> float:
        return engine.train_step(tokens_BT, targets_BT, run.optimizer.learning_rate).loss

    return Contender(step, _count(engine.model), engine)


def transformers(case: Case, precision: Precision, world: World) -> Contender:
    """The twin under the same DeepSpeed config."""
    return _under_deepspeed(Peer(case), case, precision, world)


def autoep(case: Case, precision: Precision, world: World) -> Contender:
    """The twin, Mixtral, whose mixtures are DeepSpeed's AutoEP layers.

    They are put in by hand: AutoEP's own preset wants transformers 5, where the block has another name.
    """
    peer, mixture = Peer(case), case.run.model.layers[0].ffn
    size: Any = LayerSize(0, case.run.model.dim, case.config["intermediate_size"], mixture.experts, mixture.top_k)  # type: ignore[attr-defined]
    for layer in peer.model.model.layers:
        name = "block_sparse_moe" if hasattr(layer, "block_sparse_moe") else "mlp"  # transformers 4, 5
        setattr(layer, name, AutoEPBlock(make_autoep(getattr(layer, name), size), name == "block_sparse_moe"))
    return _under_deepspeed(peer, case, precision, world)


def plain(case: Case, precision: Precision, world: World) -> Contender:
    """GPT-2 by hand in a loop by hand; bfloat16 is autocast's."""
    model = PlainGPT2(case.run.model, case.run.seed).to(world.device)
    optimizer = _optimizer(case, model, lambda groups: groups)
    max_grad_norm = case.run.optimizer.max_grad_norm
    cast = torch.autocast(world.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def step(tokens_BT: Tensor, targets_BT: Tensor) -> float:
        with cast:
            loss = model(tokens_BT.to(world.device), targets_BT.to(world.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Contender(step, _count(model))


Maker = Callable[[Case, Precision, World], Contender]


def makers(case: Case) -> dict[str, Maker]:
    """Those who can train a case."""
    found: dict[str, Maker] = {"ours": ours, "transformers": transformers}
    found |= {"autoep": autoep} if case.config["model_type"] == "mixtral" else {}
    return found | ({"plain": plain} if case.config["model_type"] == "gpt2" else {})


def _under_deepspeed(model: nn.Module, case: Case, precision: Precision, world: World) -> Contender:
    parameters = _count(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(case, model, split_expert_groups),
        config=_config(case, precision),
        dist_init_required=False,
    )

    def step(tokens_BT: Tensor, targets_BT: Tensor) -> float:
        loss = engine(tokens_BT.to(world.device), targets_BT.to(world.device))
        engine.backward(loss)
        engine.step()
        return loss.item()

    return Contender(step, parameters)


def _config(case: Case, precision: Precision) -> dict[str, Any]:
    config = case.run.fill_config(read_config(DS_CONFIG), precision, world_size=1)
    # one bucket that holds the model: of the file's 200 million elements most would never be touched, but be counted
    config["zero_optimization"]["reduce_bucket_size"] = count_parameters(case.run.model).total
    return config


def _optimizer(case: Case, model: nn.Module, split: Callable[[list[dict[str, Any]]], Any]) -> torch.optim.Optimizer:
    """AdamW as the recipe has it: matrices decay, tables and vectors do not."""
    recipe = case.run.optimizer
    assert isinstance(recipe, AdamW)
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for parameter in model.parameters():
        groups["no_decay" if parameter.dim() < 2 or parameter in tables else "decay"].append(parameter)
    decays = {"decay": recipe.weight_decay, "no_decay": 0.0}
    listed = [{"name": name, "params": group, "weight_decay": decays[name]} for name, group in groups.items()]
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(split(listed), lr=recipe.learning_rate, betas=betas, eps=recipe.eps, fused=True)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
