"""Mixture of experts: each token passes the `top_k` experts that its router chooses, and the shared ones."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mosaic_dist.model.activation_checkpointing import recomputed, remembered
from mosaic_dist.model.ffn import FFN, AuxOutputs, DenseFFN, SwiGLU
from mosaic_dist.model.moe.assignment import assign, capacity, count, count_rows, within_capacity
from mosaic_dist.model.moe.balance import balance_loss, routing_entropy, sequence_balance_loss, z_loss
from mosaic_dist.model.moe.dispatch import LocalDispatcher
from mosaic_dist.model.moe.router import Router, Routing
from mosaic_dist.model.moe.softmax_top_k import SoftmaxTopK
from mosaic_dist.spec import NonNegative, NonNegativeFloat, Positive, PositiveFloat, SpecError, UnitInterval, at, fields


class MoEBase(FFN):
    """Token-choice mixture (Shazeer et al., arXiv 1701.06538): all of a mixture but what its experts are.

    Each expert has the width of the expert spec divided by `split`: with `split = experts` a dense network is cut into
    experts of the same total size (split experts); DeepSeekMoE's fine-grained experts (arXiv 2401.06066) are
    `experts = macro * split`. Its shared experts are those that every token passes beside the chosen ones, each as
    wide as a routed one. `router_bias` gives the router's logits a learned bias.

    `aux_loss_coef` and `z_loss_coef` are the factors of the balance loss and the z-loss (`balance.py`). The shares of
    the balance loss are counted over each "micro_batch" of a rank, each "sequence", or the "global_batch": all
    ranks, and those micro-batches of the step that have been. `jitter` is multiplicative noise on what the router sees.

    No choice is ever dropped, unless there is a `capacity_factor`: in training an expert then takes at most that
    factor times an even share of a rank's micro-batch, and the choices beyond it are dropped: the last ones in the
    batch (`drop_policy` "position") or those with the lowest routing weight ("probs"). Such a token keeps what its
    other experts give.
    """

    experts: Positive
    top_k: Positive = 2
    shared_experts: NonNegative = 0
    split: Positive = 1
    router: Router = SoftmaxTopK()
    router_bias: bool = False
    aux_loss_coef: NonNegativeFloat = 0.01
    aux_loss_scope: Literal["micro_batch", "sequence", "global_batch"] = "micro_batch"
    z_loss_coef: NonNegativeFloat = 0.0
    jitter: UnitInterval = 0.0
    capacity_factor: PositiveFloat | None = None
    drop_policy: Literal["position", "probs"] = "position"


class MoE(MoEBase, type="moe"):
    """Mixture over any dense network."""

    expert: DenseFFN

    def validate(self) -> None:
        """`top_k` of `experts` can be chosen and `split` divides the width."""
        if self.drop_policy != "position" and self.capacity_factor is None:
            raise SpecError(
                "drop_policy", f"{self.drop_policy!r} without a capacity_factor, but then nothing is dropped; set one"
            )
        if self.top_k > self.experts:
            raise SpecError("top_k", f"{self.top_k} experts per token, but there are {self.experts} experts")
        if self.expert.hidden_dim % self.split:
            raise SpecError("split", f"{self.split} must divide the expert's width ({self.expert.hidden_dim})")
        with at("router"):
            self.router.check_choice(self.experts, self.top_k)

    def build(self, dim: int) -> nn.Module:
        """Build router, experts and shared experts for a model `dim` wide."""
        return MixtureOfExperts(self, dim)


class MoESwiGLU(MoEBase, type="moe_swiglu"):
    """Short form of a mixture whose experts are SwiGLU networks of hidden width `hidden_dim`."""

    hidden_dim: Positive

    def validate(self) -> None:
        """The long form is well-formed."""
        self.written_out()

    def written_out(self) -> MoE:
        """The long form."""
        return MoE(expert=SwiGLU(hidden_dim=self.hidden_dim), **{name: getattr(self, name) for name in fields(MoEBase)})

    def build(self, dim: int) -> nn.Module:
        """The module of the long form."""
        return self.written_out().build(dim)


class MixtureOfExperts(nn.Module):
    """The module of all mixtures. Router, dispatcher and experts are siblings: the dispatcher can be replaced without
    touching the others.

    router.weight [experts, dim]; the weights of `experts` are stacked, [experts, inputs, outputs]; `shared` is one
    network as wide as all shared experts together, or None: their sum, with one output bias and one ternary scale.

    `chunks` cuts the tokens into so many parts that pass the experts one after the other, and again in the backward
    pass: at most ranks * ceil(S / chunks) * top_k rows are here at a time, however unbalanced the routing is.
    """

    def __init__(self, spec: MoE, dim: int):
        super().__init__()
        self.spec = spec
        width = spec.expert.hidden_dim // spec.split
        self.router = spec.router.build(dim, spec.experts, spec.top_k, spec.router_bias)
        self.dispatcher: Any = LocalDispatcher()
        self.experts = spec.expert.build_experts(dim, width, spec.experts)
        self.shared = spec.expert.build_network(dim, spec.shared_experts * width) if spec.shared_experts else None
        self.chunks = 1
        self.step_counts_E: Any = 0
        """Choices per expert of all processes in this step so far; for `aux_loss_scope: global_batch`."""

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, AuxOutputs]:
        """x_BTD -> ([B, T, D], extras).

        AuxOutputs: balance_loss and z_loss, weighted scalars, where their weights are not zero; expert_load [E] int64
        choices per expert, dropped ones included; balance, z, entropy, drop_rate: detached scalars, unweighted.
        """
        x_SD = x_BTD.flatten(0, -2)
        routing = self.router(self._jittered(x_SD))
        kept_SK = self._kept(routing)
        shared: list[Tensor] = []

        def overlap_fn() -> None:
            if self.shared is not None and not shared:
                shared.append(self.shared(x_SD))

        out_SD = self._routed(x_SD, routing, kept_SK, overlap_fn)
        if shared:
            out_SD = out_SD + shared[0]
        load_E = count(routing.experts_SK.flatten(), self.spec.experts)
        counts = self._counts(routing.experts_SK, load_E, sequence=x_BTD.shape[-2])
        return out_SD.view_as(x_BTD), self.measure(routing, load_E, counts, kept_SK, x_BTD.shape[:-1])

    def _jittered(self, x_SD: Tensor) -> Tensor:
        """What the router sees: in training, inputs times noise in 1 +- jitter (arXiv 2101.03961, section 2.4)."""
        if not self.spec.jitter or not self.training:
            return x_SD
        x_SD = x_SD.float()  # near 1, bfloat16 has steps of 1/256: noise of a per cent would be a handful of values
        return x_SD * torch.empty_like(x_SD).uniform_(1 - self.spec.jitter, 1 + self.spec.jitter)

    def _kept(self, routing: Routing) -> Tensor | None:
        """Which choices find a place, [S, K] bool; None if all do."""
        if self.spec.capacity_factor is None or not self.training:
            return None
        S, K = routing.experts_SK.shape
        places = capacity(S, self.spec.experts, K, self.spec.capacity_factor)
        return remembered(lambda: within_capacity(routing, places, self.spec.drop_policy))

    def _routed(self, x_SD: Tensor, routing: Routing, kept_SK: Tensor | None, overlap_fn: Callable[[], None]) -> Tensor:
        """The sum over its choices for each token, [S, D]."""

        def pass_experts(
            x_SD: Tensor,
            weights_SK: Tensor,
            experts_SK: Tensor,
            kept_SK: Tensor | None,
            overlap_fn: Callable[[], None] = lambda: None,
        ) -> Tensor:
            rows = assign(weights_SK, experts_SK, kept_SK, self.spec.experts)
            return self.dispatcher(x_SD, rows, self.experts, overlap_fn)

        whole = (x_SD, routing.weights_SK, routing.experts_SK, kept_SK)
        if self.chunks == 1:
            return pass_experts(*whole, overlap_fn)
        overlap_fn()  # not within a part: parts that run again would keep all that it names, the layer's input too
        parts = zip(*(_cut(value, self.chunks) for value in whole), strict=True)
        return torch.cat([recomputed(pass_experts, *part) for part in parts])

    def measure(
        self, routing: Routing, load_E: Tensor, counts: Tensor, kept_SK: Tensor | None, shape: torch.Size
    ) -> AuxOutputs:
        """Losses and measurements of the routing; `shape` is that of the tokens, [B, T].

        `load_E` counts the choices here, and `counts` those that the balance loss is to see; see `_counts`.
        """
        spec, (logits_SE, probs_SE, _, _) = self.spec, routing
        if spec.aux_loss_scope == "sequence":
            balance = sequence_balance_loss(probs_SE.reshape(-1, shape[-1], spec.experts), counts)
        else:
            balance = balance_loss(probs_SE, counts)
        z = z_loss(logits_SE)
        extras = {
            "expert_load": load_E,
            "balance": balance.detach(),
            "z": z.detach(),
            "entropy": routing_entropy(probs_SE.detach()),
            "drop_rate": z.new_zeros(()) if kept_SK is None else (~kept_SK).float().mean(),
        }
        weighted = {"balance_loss": (spec.aux_loss_coef, balance), "z_loss": (spec.z_loss_coef, z)}
        return extras | {name: weight * loss for name, (weight, loss) in weighted.items() if weight}

    def _counts(self, experts_SK: Tensor, load_E: Tensor, sequence: int) -> Tensor:
        """Choices per expert that the balance loss sees: [E], or of each sequence of so many tokens [B, E].

        Of all processes that have a part of the micro-batch, or of the global batch.
        """
        spec = self.spec
        if spec.aux_loss_scope == "global_batch" and self.training:
            return self._counted(load_E)
        counts = load_E
        if spec.aux_loss_scope == "sequence":
            counts = count_rows(experts_SK.reshape(-1, sequence * spec.top_k), spec.experts)
        return remembered(lambda: self.dispatcher.micro_batch_counts(counts))

    def _counted(self, load_E: Tensor) -> Tensor:
        """Add a micro-batch to the counts of the step, those of all processes, once; a copy of the sum."""

        def add() -> Tensor:
            self.step_counts_E = self.step_counts_E + self.dispatcher.total_counts(load_E)
            return self.step_counts_E

        return remembered(add)

    def end_step(self, counts_E: Tensor | None) -> None:
        """Called after a step with the choices per expert of all processes, [E]; None if the update was left out."""
        self.step_counts_E = 0
        if counts_E is not None:
            self.router.balance(counts_E)


def _cut(value: Tensor | None, parts: int) -> Sequence[Tensor | None]:
    return [None] * parts if value is None else value.tensor_split(parts)
