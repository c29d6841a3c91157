"""A model whose layers have different experts, and the plain loop on one process that every layout must equal.

The loop knows ranks and micro-batches only as rows of the batch, and has no word of our engine: the auxiliary losses
are written out here from the routers' choices, because `aux_loss_scope` is about who counts what.
"""

import itertools
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mosaic_dist.model import GELU, MHA, Block, Init, MoE, MuP, SigmoidTopK, SwiGLU, Transformer, TransformerModel
from mosaic_dist.model.moe import Routing
from mosaic_dist.optim import AdamW, Muon, Optimizer
from mosaic_dist.parallel import Engine, Parallel, Precision, World, fill_config
from mosaic_dist.targets import IGNORE_INDEX

STEPS, BATCH, LENGTH = 3, 16, 12
LEARNING_RATE, RATE = 1e-2, 0.05
# with so large an epsilon an update is smooth in the gradient: the last bits of one near zero are not blown up
OPTIMIZER = AdamW(learning_rate=LEARNING_RATE, max_grad_norm=0.3, weight_decay=0.1, eps=1e-5)
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": OPTIMIZER,
    "muon": Muon(learning_rate=LEARNING_RATE, max_grad_norm=0.3, weight_decay=0.1, eps=1e-5),
}
MODEL = Transformer(
    vocab_size=64,
    dim=16,
    max_seq_len=LENGTH,
    init=Init(std=0.1),
    layers=(
        Block(
            attention=MHA(heads=2),
            ffn=MoE(
                expert=SwiGLU(hidden_dim=32),
                split=4,
                experts=8,
                top_k=2,
                shared_experts=1,
                router=SigmoidTopK(expert_bias_update_rate=RATE),
                aux_loss_coef=0.2,
                aux_loss_scope="global_batch",
                z_loss_coef=0.05,
            ),
        ),
        Block(
            attention=MHA(heads=2),
            ffn=MoE(expert=GELU(hidden_dim=8, bias=True), experts=16, top_k=3, router_bias=True, aux_loss_coef=0.2),
        ),
    ),
)
WIDENED = MuP(std=0.1, base={"dim": 4, "layers[0].ffn.expert.hidden_dim": 8})
"""By which nearly every matrix learns at another rate; the experts of a layer at two."""
CHOICES = sum(block.ffn.top_k for block in MODEL.layers)
"""Of each token, in all layers together."""


class Case(NamedTuple):
    """A layout of the engine."""

    ranks: int
    stage: int
    degree: int
    accumulation: int
    precision: Precision
    optimizer: str = "adamw"
    init: Literal["gpt2", "mup"] = "gpt2"

    def __str__(self) -> str:
        suffix = "".join(f"_{word}" for word in (self.optimizer, self.init) if word not in ("adamw", "gpt2"))
        return "w{}_z{}_e{}_a{}_{}".format(*self) + suffix


def cases(ranks: int) -> list[Case]:
    """The layouts of so many ranks: all of them in float32 up to four ranks, some of eight, some in bfloat16."""
    degrees = [degree for degree in (1, 2, 4, 8) if ranks % degree == 0]
    if ranks == 8:
        return [Case(8, stage, degree, 2 - stage % 2, "fp32") for stage in (0, 2, 3) for degree in degrees]
    found = [Case(ranks, *layout, "fp32") for layout in itertools.product(range(4), degrees, (1, 2))]
    if ranks == 2:
        found += [Case(ranks, stage, stage % 2 + 1, 1, "fp32", init="mup") for stage in range(4)]
    else:
        found += [Case(ranks, *layout, "bf16") for layout in itertools.product((1, 2, 3), degrees, (2,))]
    return found


def muon_cases(ranks: int) -> list[Case]:
    """Those of Muon: stages and degrees of four ranks, and one rank to compare with."""
    if ranks == 1:
        return [Case(1, 2, 1, 2, "fp32", "muon"), Case(1, 1, 1, 2, "bf16", "muon")]
    layouts = [(0, 2, 2), (1, 1, 1), (1, 4, 2), (2, 2, 2), (3, 1, 1), (3, 2, 2), (3, 4, 2)]
    found = [Case(ranks, *layout, "fp32", "muon") for layout in layouts]
    return found + [Case(ranks, stage, 2, 2, "bf16", "muon") for stage in (1, 2, 3)]


def model_of(case: Case) -> Transformer:
    """The model that a layout trains: in bfloat16 one whose losses do not depend on how the batch is cut."""
    if case.precision == "fp32":
        return MODEL if case.init == "gpt2" else replace(MODEL, init=WIDENED)
    uncut = (replace(block, ffn=replace(block.ffn, aux_loss_scope="sequence")) for block in MODEL.layers)
    return replace(MODEL, layers=tuple(uncut))


def make_engine(
    world: World,
    case: Case,
    model: Transformer | None = None,
    parallel: Parallel = Parallel(),  # noqa: B008 - a frozen value
    **zero: Any,
) -> Engine:
    """The engine of this rank, with further settings of ZeRO; `model` None: `model_of` the case."""
    # without the threshold ZeRO-3 would keep parameters as small as these whole on every rank
    settings = {"stage": case.stage, "stage3_param_persistence_threshold": 0} | zero
    config = fill_config(
        {"zero_optimization": settings},
        precision=case.precision,
        micro_batch_size=BATCH * parallel.sequence_parallel // world.size // case.accumulation,
        accumulation=case.accumulation,
        world_size=world.size,
        max_grad_norm=OPTIMIZER.max_grad_norm,
    )
    optimizer = OPTIMIZERS[case.optimizer]
    return Engine(model or model_of(case), optimizer, config, case.degree, 0, world, parallel=parallel)


def my_part(world: World) -> slice:
    """Rows of the global batch that this rank trains on."""
    return slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Per step inputs and targets [BATCH, LENGTH] of the global batch; the first rows score few of their tokens."""
    generator = torch.Generator().manual_seed(1)
    walk = torch.randint(0, 7, (STEPS, BATCH, LENGTH + 1), generator=generator).cumsum(-1) % MODEL.vocab_size
    inputs, targets = walk[..., :-1].contiguous(), walk[..., 1:].contiguous()
    targets[:, :3, 2:] = IGNORE_INDEX
    return list(zip(inputs, targets, strict=True))


class Plain(NamedTuple):
    """What the plain loop gives."""

    results: list[list[float]]
    """Per step: loss, auxiliary loss, gradient norm."""
    gradients: dict[str, Tensor]
    """Of the first step, clipped, by parameter."""
    weights: dict[str, Tensor]
    """After the last step; the corrections of the routers with them."""


def plain_training(ranks: int, accumulation: int, chosen: Optimizer = OPTIMIZER, init: Init = MODEL.init) -> Plain:
    """`MODEL` on one process, as so many ranks with so many micro-batches would have to train it."""
    model = replace(MODEL, init=init).build_initialized(0)
    optimizer = chosen.build(chosen.groups(model, model.spec.width_factors()))
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * group["rate"]
    results: list[list[float]] = []
    gradients: dict[str, Tensor] = {}
    for inputs, targets in batches():
        cut = (ranks, accumulation, -1, LENGTH)
        loss, auxiliary, counts = one_step(model, inputs.view(cut), targets.view(cut))
        (loss + auxiliary).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.max_grad_norm)
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        correction = model.layers[0].ffn.router.expert_bias
        correction += RATE * (counts[0].mean() - counts[0]).sign()
        results.append([loss.item(), auxiliary.item(), norm.item()])
    return Plain(results, gradients, {name: value.detach() for name, value in model.state_dict().items()})


def one_step(model: TransformerModel, inputs_WABT: Tensor, targets_WABT: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Mean cross-entropy, auxiliary loss, and choices per expert of each layer, of rows by rank and micro-batch."""
    routings: list[Routing] = []
    mixtures = [block.ffn for block in model.layers]
    handles = [layer.router.register_forward_hook(lambda _m, _i, out: routings.append(out)) for layer in mixtures]
    W, A = inputs_WABT.shape[:2]
    total, auxiliary = torch.zeros(()), torch.zeros(())
    counts = [torch.zeros(layer.spec.experts) for layer in mixtures]
    for a in range(A):
        total = total + sum(model(inputs_WABT[w, a], targets_WABT[w, a]).cross_entropy_sum for w in range(W))
        for i, layer in enumerate(mixtures):
            of_ranks, spec = routings[i :: len(mixtures)], layer.spec
            chosen = [functional.one_hot(routing.experts_SK, spec.experts).sum((0, 1)).float() for routing in of_ranks]
            counts[i] = counts[i] + sum(chosen)
            for routing, own_E in zip(of_ranks, chosen, strict=True):
                counted_E = counts[i] if spec.aux_loss_scope == "global_batch" else own_E
                balance = spec.experts * (counted_E / counted_E.sum() * routing.probs_SE.mean(0)).sum()
                z = routing.logits_SE.exp().sum(-1).log().square().mean()
                auxiliary = auxiliary + (spec.aux_loss_coef * balance + spec.z_loss_coef * z) / (W * A)
        routings.clear()
    for handle in handles:
        handle.remove()
    return total / (targets_WABT != IGNORE_INDEX).sum(), auxiliary, counts
