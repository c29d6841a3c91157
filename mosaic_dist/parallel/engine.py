"""One optimizer step over all ranks: the only place that drives the DeepSpeed engine."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mosaic_dist.model import (
    Experts,
    LossOutput,
    MixtureOfExperts,
    Transformer,
    apply_activation_checkpointing,
    compile_layers,
    initialize,
    materialize,
)
from mosaic_dist.model.block import BlockModule
from mosaic_dist.optim import Optimizer
from mosaic_dist.optim.muon import MuonAdamW
from mosaic_dist.parallel.cut_matrices import CutMatrices
from mosaic_dist.parallel.dispatcher import place_experts
from mosaic_dist.parallel.loss_scale import restore_scale, scale_state
from mosaic_dist.parallel.partition import drop_summed_gradients, partitioned_parameters, zero_optimizer_in_bfloat16
from mosaic_dist.parallel.sequence import join_sequences, place_sequences
from mosaic_dist.parallel.spec import Parallel
from mosaic_dist.parallel.world import World
from mosaic_dist.targets import IGNORE_INDEX

HeldOut = tuple[Tensor, Tensor, Tensor | None]
"""Inputs, targets and documents of a batch, int64 [B, T] of the same shape on every rank (see `Engine.train_step`)."""


@dataclasses.dataclass
class StepResult:
    """What a step did, the same on every rank."""

    loss: float
    """Mean cross-entropy per scored token over the global batch, in nats."""
    auxiliary_loss: float
    """Weighted auxiliary losses, mean over micro-batches and ranks."""
    z_loss: float
    """Weighted z-loss of the logits, mean per scored token over the global batch."""
    tokens: int
    """Scored tokens of the global batch."""
    grad_norm: float
    """Global L2 norm before clipping; infinite where gradients overflowed."""
    skipped: bool
    """Whether the weights were left alone because a gradient was not finite, or the step was rejected."""
    rejected: bool
    """Whether the loss was above the limit that it was given."""
    expert_load: Tensor
    """Choices per expert over the global batch, [layers, E] int64 on CPU."""
    router: Tensor
    """`ROUTER_MEASURES` of each layer with experts, means over the global batch, [layers, measures] on CPU."""
    votes: tuple[bool, ...] = ()
    """For each answer that the ranks gave beside their losses: whether any of them said yes."""


class Engine:
    """A model in training: this rank's experts of it, under DeepSpeed.

    `config` is a filled DeepSpeed config, `degree` the expert-parallel degree. The weights start from `seed` alone, or
    are what `fill` writes into the parameters and buffers of this rank's model.
    """

    def __init__(
        self,
        spec: Transformer,
        optimizer: Optimizer,
        config: dict[str, Any],
        degree: int,
        seed: int,
        world: World,
        fill: Callable[[nn.Module], None] | None = None,
        parallel: Parallel = Parallel(),  # noqa: B008 - a frozen value
    ):
        with torch.device("meta"):
            model = spec.build()
        place_experts(model, degree, world.rank)
        self.sequences = join_sequences(parallel, world)
        place_sequences(model, self.sequences)
        self.mixtures = [layer for layer in model.modules() if isinstance(layer, MixtureOfExperts)]
        for layer in self.mixtures:
            layer.chunks = parallel.expert_chunks
        if parallel.compile:
            # what ZeRO-3 does around a module has no place inside of compiled code, so it is to gather whole blocks
            deepspeed.utils.set_z3_leaf_modules(model, [BlockModule])
            compile_layers(model, parallel.activation_checkpointing, world.device)
        elif self.mixtures:
            # their layers are used together, so ZeRO-3 is to gather them together; and it takes gradients for complete
            # after the first backward pass of what it gathers, which with chunks must be the whole mixture
            deepspeed.utils.set_z3_leaf_modules(model, [Experts if parallel.expert_chunks == 1 else MixtureOfExperts])
        apply_activation_checkpointing(model, parallel.activation_checkpointing)
        materialize(model, torch.device("cpu"))
        factors = spec.width_factors()
        if fill is None:
            initialize(model, spec.init, len(spec.layers), seed, {name: each.start for name, each in factors.items()})
        else:
            fill(model)
        self.world, self.degree = world, degree
        self.zero_stage: int = config["zero_optimization"]["stage"]
        self.micro_batch_size: int = config["train_micro_batch_size_per_gpu"]
        self.accumulation: int = config["gradient_accumulation_steps"]
        """Micro-batches of the last step."""
        self.max_grad_norm = optimizer.max_grad_norm
        self.is_compiled = parallel.compile
        self.loss_is_scaled: bool = config["fp16"]["enabled"]
        self.before_update: Callable[[], None] = lambda: None
        """Called before weights, optimizer states or buffers change."""
        with zero_optimizer_in_bfloat16():
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer.build(split_expert_groups(optimizer.groups(model, factors))),
                config=config,
                dist_init_required=False,
            )
        inner = self.deepspeed.basic_optimizer
        if isinstance(inner, MuonAdamW) and self.zero_stage:
            cut = partitioned_parameters(self.deepspeed.optimizer, self.zero_stage)
            inner.directions = CutMatrices(cut, world.device)

    @property
    def model(self) -> nn.Module:
        """The module with this rank's parameters."""
        return self.deepspeed.module

    def train_step(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        learning_rate: float,
        documents_BT: Tensor | None = None,
        vote: Callable[[], Sequence[bool]] = tuple,
        loss_limit: float = math.inf,
    ) -> StepResult:
        """Forward and backward over this rank's sequences, a micro-batch at a time, then one update.

        inputs_BT, targets_BT, documents_BT (see `TransformerModel.forward`) int64, of the same shape on every rank,
        with as many micro-batches as the step is to have, and the same on ranks that share sequences. The gradient is
        that of the mean cross-entropy over all scored tokens of the global batch plus the mean of the auxiliary losses.
        `vote` is asked once, after the update, for as many answers on each rank; they travel with the losses. Where the
        loss of the global batch is above `loss_limit`, the same on all ranks, the update is left out: weights,
        optimizer states and buffers stay as they are. Every rank must call.
        """
        self._accumulate(len(inputs_BT))
        device = self.world.device
        scored = (self.sequences.cut(targets_BT) != IGNORE_INDEX).sum().to(device, non_blocking=True)
        dist.all_reduce(scored)
        # DeepSpeed averages over micro-batches and ranks, so the sum over tokens is scaled up by their number
        scale = self.accumulation * self.world.size / scored.clamp(min=1)
        parts: list[LossOutput] = []
        rejected = torch.tensor(False)
        whole = (inputs_BT, targets_BT) if documents_BT is None else (inputs_BT, targets_BT, documents_BT)
        for micro_batch_size in zip(*(tensor.chunk(self.accumulation) for tensor in whole), strict=True):
            part = self._forward(*(tensor.to(device, non_blocking=True) for tensor in micro_batch_size))
            parts.append(LossOutput(*(value.detach() for value in part)))
            loss = part.cross_entropy_sum * scale + part.auxiliary
            if len(parts) == self.accumulation and loss_limit < math.inf:
                rejected = self._exceeds(loss_limit, parts, scored)
                loss = loss * torch.where(rejected, math.nan, 1.0)  # on the device: no rank waits for its queue here
            self.deepspeed.backward(loss)
            if len(parts) < self.accumulation:
                self.deepspeed.step()  # counts the micro-batch; the update comes with the last one
        scale_before = scale_state(self.deepspeed.optimizer)
        grad_norm, skipped = self._update(learning_rate)
        if rejected:  # the loss scale of fp16 takes our NaN for an overflow
            restore_scale(self.deepspeed.optimizer, scale_before)
        result = self._summarize(parts, scored, grad_norm, skipped, bool(rejected), vote())
        load_LE = result.expert_load.to(device, non_blocking=True)  # one copy for all layers, and no wait for it
        for layer, load_E in zip(self.mixtures, load_LE, strict=True):
            layer.end_step(None if skipped else load_E[: layer.spec.experts])
        return result

    def _exceeds(self, limit: float, parts: list[LossOutput], scored: Tensor) -> Tensor:
        """Whether the loss of the global batch is above a limit and finite, bool scalar. Every rank must call."""
        cross_entropy = torch.stack([part.cross_entropy_sum for part in parts]).double().sum()
        dist.all_reduce(cross_entropy)
        loss = cross_entropy / scored.clamp(min=1)
        return loss.isfinite() & (loss > limit)

    def _accumulate(self, sequences: int) -> None:
        """Let the next update come behind so many sequences of this rank."""
        assert sequences % self.micro_batch_size == 0, (
            f"{sequences} sequences do not divide into micro-batches of {self.micro_batch_size}"
        )
        if sequences == self.accumulation * self.micro_batch_size:
            return
        self.accumulation = sequences // self.micro_batch_size
        self.deepspeed.set_train_batch_size(sequences * self.world.size)
        # DeepSpeed updates where its count of all micro-batches divides by those of a step, whatever they were before
        self.deepspeed.micro_steps = self.deepspeed.global_steps * self.accumulation

    def _forward(self, inputs_BT: Tensor, targets_BT: Tensor | None, documents_BT: Tensor | None = None) -> Any:
        """What the model gives for this rank's tokens of the sequences."""
        cut = self.sequences.cut
        targets_BT = None if targets_BT is None else cut(targets_BT)
        return self.deepspeed(cut(inputs_BT), targets_BT, metadata=self.sequences.metadata(inputs_BT, documents_BT))

    def _update(self, learning_rate: float) -> tuple[float, bool]:
        """Clip and update. Returns the gradient norm and whether the update was skipped."""
        self.before_update()
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
        if self.zero_stage == 0:
            grad_norm = self._clip_replicated()
            if not math.isfinite(grad_norm):  # on every rank: the norm is a global one
                self._pass_over()
                return grad_norm, True
            self.deepspeed.step()
            return grad_norm, False
        self.deepspeed.step()
        is_skipped = bool(self.deepspeed.optimizer.overflow)
        if is_skipped and self.zero_stage < 3:
            drop_summed_gradients(self.deepspeed.optimizer)
        return float(self.deepspeed.get_global_grad_norm()), is_skipped

    def _pass_over(self) -> None:
        """Without ZeRO: drop the gradients and count the step, as DeepSpeed does by itself with ZeRO."""
        for parameter in self.model.parameters():
            parameter.grad = None
        self.deepspeed.micro_steps += 1
        self.deepspeed.global_steps += 1
        self.deepspeed.skipped_steps += 1

    def _clip_replicated(self) -> float:
        """Global gradient norm without ZeRO, and clipping by it.

        DeepSpeed's own averages norms over ranks here, which is wrong with experts. Gradients of replicated parameters
        are equal on all ranks; those of experts are summed over the expert group, whose ranks hold all of them.
        """
        squares = {key: torch.zeros((), device=self.world.device) for key in (True, False)}
        gradients = [(p.grad, getattr(p, "allreduce", True)) for p in self.model.parameters() if p.grad is not None]
        for gradient, replicated in gradients:
            squares[replicated] += gradient.float().square().sum()
        if self.degree > 1:
            dist.all_reduce(squares[False])
            squares[False] /= self.world.size // self.degree  # each expert is held by that many ranks
        norm = (squares[True] + squares[False]).sqrt()
        if self.max_grad_norm:
            factor = self.max_grad_norm / (norm + 1e-6)
            for gradient, _ in gradients:
                gradient.mul_(factor.clamp(max=1.0))
        return norm.item()

    def _summarize(
        self,
        parts: list[LossOutput],
        scored: Tensor,
        grad_norm: float,
        skipped: bool,
        rejected: bool,
        answers: Sequence[bool],
    ) -> StepResult:
        """Add the losses of all micro-batches and ranks up, and count who said yes."""
        sums_of_parts = [torch.stack([part.cross_entropy_sum, part.auxiliary, part.z_loss_sum]) for part in parts]
        losses = torch.stack(sums_of_parts).double().sum(0)
        sums = torch.cat([losses, torch.tensor(answers, dtype=losses.dtype).to(losses.device, non_blocking=True)])
        load = torch.stack([p.expert_load for p in parts]).sum(0)
        router = torch.stack([p.router for p in parts]).mean(0) / self.world.size
        dist.all_reduce(sums)
        if load.numel():
            dist.all_reduce(load)
            dist.all_reduce(router)
        tokens, cross_entropy, auxiliary, z_loss, *votes = torch.cat([scored.double()[None], sums]).tolist()
        return StepResult(
            loss=cross_entropy / max(1, tokens),
            auxiliary_loss=auxiliary / (self.accumulation * self.world.size),
            z_loss=z_loss / max(1, tokens),
            tokens=int(tokens),
            grad_norm=grad_norm,
            skipped=skipped,
            rejected=rejected,
            expert_load=load.cpu(),
            router=router.cpu(),
            votes=tuple(count > 0 for count in votes),
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[HeldOut]) -> float:
        """Mean cross-entropy per scored token over the batches of all ranks. Each rank must bring as many batches."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for inputs_BT, targets_BT, documents_BT in self._without_dropout(batches):
            sums[0] += self._forward(inputs_BT, targets_BT, documents_BT).cross_entropy_sum
            sums[1] += (self.sequences.cut(targets_BT) != IGNORE_INDEX).sum()
        dist.all_reduce(sums)
        return (sums[0] / sums[1].clamp(min=1)).item()

    @torch.no_grad()
    def exact_match(self, batches: Iterable[HeldOut]) -> float:
        """Share of rows, over the batches of all ranks, whose scored targets are all what greedy decoding gives.

        A greedy answer is right to the letter exactly if each of its tokens is the most likely one after the right
        tokens before it. So one forward pass tells, of the same shape on every rank, and none waits for another's
        answer to end. Rows without a scored target do not count. Each rank must bring as many batches.
        """
        counts, cut = torch.zeros(2, dtype=torch.int64, device=self.world.device), self.sequences.cut
        for inputs_BT, targets_BT, documents_BT in self._without_dropout(batches):
            likeliest_BT, targets_BT = self._forward(inputs_BT, None, documents_BT).argmax(-1), cut(targets_BT)
            scored_BT = targets_BT != IGNORE_INDEX
            wrong_BT = scored_BT & (likeliest_BT != targets_BT)
            scored_B, wrong_B = self.sequences.total(torch.stack([scored_BT.sum(1), wrong_BT.sum(1)]))
            asked_B = scored_B > 0
            counts += torch.stack([(asked_B & (wrong_B == 0)).sum(), asked_B.sum()])
        dist.all_reduce(counts)
        right, asked = counts.tolist()
        return right / max(1, asked)

    def _without_dropout(self, batches: Iterable[HeldOut]) -> Iterator[HeldOut]:
        """The batches on this rank's device, with the model in evaluation mode until the last of them is done."""
        device = self.world.device
        self.deepspeed.eval()
        for inputs_BT, targets_BT, documents_BT in batches:
            yield inputs_BT.to(device), targets_BT.to(device), None if documents_BT is None else documents_BT.to(device)
        self.deepspeed.train()


def split_expert_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the experts of each optimizer group a group of their own, as DeepSpeed wants it under expert parallelism."""
    if all(getattr(parameter, "allreduce", True) for group in groups for parameter in group["params"]):
        return groups
    split = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(groups)
    return [group for group in split if group["params"]]  # nothing is left of a group that was of experts only
