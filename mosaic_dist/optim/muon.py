"""Muon for the matrices of the blocks, AdamW for all other parameters, in one optimizer.

Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) makes a matrix's momentum nearly orthogonal before it is
subtracted, so that all directions are learnt as fast as the steepest. The step is scaled as in Moonlight (Liu et al.,
arXiv 2502.16982), and takes AdamW's learning rate and weight decay.

`torch.optim.Muon` makes the same step, but of whole two-dimensional parameters only: it knows no stacks of experts, no
other parameters beside, and no matrices that ZeRO has cut up.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mosaic_dist.optim.adamw import AdamW
from mosaic_dist.optim.groups import NO_RATES, Rates, parameter_groups, split_matrices, split_rates
from mosaic_dist.spec import UnitInterval

MOMENTUM = "momentum_buffer"
"""Name of Muon's state, a number per element where AdamW has two."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's: singular values from 0.01 to 1 are near 1 after ITERATIONS, if not exactly (0.7 to 1.2)."""
ITERATIONS = 5
SMALLEST_NORM = 1e-7
"""Shorter matrices are divided by this instead, so that a matrix of zeros stays zero."""
BATCH_ELEMENTS = 1 << 26
"""As many elements are made orthogonal at once: enough to keep a GPU busy, and half a gigabyte of workspace."""


class Muon(AdamW, type="muon"):
    """Muon for the matrices of the blocks, AdamW (whose fields these are) for tables, heads, gains and biases.

    Choose it to reach a loss with fewer tokens than AdamW (Moonlight: with about half), at AdamW's learning rate and
    weight decay, and with one number of state per element of a matrix instead of two. Stay with AdamW where batches are
    small: an update costs 5 * (smaller side of a matrix) / (tokens that it sees in a step) of the training itself, and
    an expert sees only its share of the tokens. Best with ZeRO 1 or 2: stage 0 repeats that work on every rank, and
    stage 3 sends every matrix to the rank that does it.

    Each expert's matrix is one by itself. Routers are matrices, too, as in Moonlight, where their spectra gained most.
    `momentum` is Nesterov's.
    """

    momentum: UnitInterval = 0.95

    def groups(self, model: nn.Module, rates: Mapping[str, Rates] = NO_RATES) -> list[dict[str, Any]]:
        """As AdamW's, and a group `matrices` that is told by `by_muon`."""
        groups = split_matrices(parameter_groups(model, self.weight_decay), model.get_submodule("layers"))
        return split_rates(groups, model, rates)

    def build(self, groups: list[dict[str, Any]]) -> "MuonAdamW":
        """Muon for the groups marked as matrices, AdamW for the rest, in one optimizer."""
        return MuonAdamW(
            groups, lr=self.learning_rate, betas=(self.beta1, self.beta2), eps=self.eps, momentum=self.momentum
        )


class Step(NamedTuple):
    """Which way a stretch of a parameter goes."""

    stretch: Tensor
    """View of the parameter."""
    direction: Tensor
    """Of the stretch's shape; its dtype is that of the iteration."""
    scale: float
    """Multiplies the direction."""


class MuonAdamW(torch.optim.AdamW):
    """Muon for the groups that say `by_muon`, PyTorch's fused AdamW for the others.

    `directions(parameter, update)` is the seam for parameters that are not matrices but parts of such: it gives the
    steps that all of its elements make.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, momentum: float
    ):
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.momentum = momentum
        self.directions: Callable[[Tensor, Tensor], Iterator[Step]] = whole_matrices

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have gradients. DeepSpeed passes one group at a time in `param_groups`."""
        assert closure is None, "gradients are there when an update is asked for"
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["by_muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["by_muon"] else ():
                if parameter.grad is not None:
                    self._step_matrices(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _step_matrices(self, parameter: Tensor, gradient: Tensor, learning_rate: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)  # as AdamW counts its own
            state[MOMENTUM] = torch.zeros_like(parameter)
        state["step"] += 1
        momentum = state[MOMENTUM].lerp_(gradient, 1 - self.momentum)
        update = gradient.lerp(momentum, self.momentum)
        parameter.mul_(1 - learning_rate * weight_decay)
        for stretch, direction, scale in self.directions(parameter, update):
            stretch.add_(direction.to(stretch.device), alpha=-learning_rate * scale)


def whole_matrices(parameter: Tensor, update: Tensor) -> Iterator[Step]:
    """The steps of a matrix [rows, columns], or of a stack of such."""
    rows, columns = parameter.shape[-2:]
    stretches = parameter.view(-1, rows, columns)
    updates = update.view(-1, rows, columns).to(iteration_dtype(update.device))
    for i, direction in enumerate(orthogonalize_all(list(updates))):
        yield Step(stretches[i], direction, step_scale(rows, columns))


def step_scale(rows: int, columns: int) -> float:
    """What brings an orthogonal matrix to the size of AdamW's usual update, a root mean square of 0.2 (Moonlight)."""
    return 0.2 * math.sqrt(max(rows, columns))


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Bfloat16 where the hardware multiplies it, which is precise enough; else float32."""
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bf16 else torch.float32


def orthogonalize_all(updates: Sequence[Tensor]) -> Iterator[Tensor]:
    """`orthogonalize` of matrices of any shapes, in their order; neighbours of one shape are done together."""
    begin = 0
    while begin < len(updates):
        shape, most = updates[begin].shape, max(1, BATCH_ELEMENTS // updates[begin].numel())
        end = begin + 1
        while end < len(updates) and end - begin < most and updates[end].shape == shape:
            end += 1
        yield from orthogonalize(torch.stack(list(updates[begin:end])))
        begin = end


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly U V^T of each matrix U S V^T: [n, rows, columns] of any floating dtype, in which all is computed.

    Newton and Schulz's iteration as an odd polynomial of degree five, with Jordan's coefficients, on the side where
    the square is smaller.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x
