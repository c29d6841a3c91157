"""`python -m mosaic_dist coordinate_check`: whether a few steps move a model by as much, however wide it is.

The test of Yang et al. (arXiv 2203.03466, appendix D.1): what changes with the width in the first steps will do so in
the whole run, and the best learning rate with it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mosaic_dist.compare.sweep_config import named_run, with_flags
from mosaic_dist.errors import UserError
from mosaic_dist.figure import publish, pyplot
from mosaic_dist.files import check_output_file
from mosaic_dist.model import MixtureOfExperts, MuP
from mosaic_dist.plan.command import load_recipe
from mosaic_dist.run_spec import Run
from mosaic_dist.spec import Positive, override

PARTS = ("embedding", "attention", "ffn", "logits")
"""What is measured: the hidden states before the first block, what all attentions and networks give, and the logits."""
FLAT = 0.25
"""A rule that is wrong is so by a power of 1/2 at least; slopes up to half of that, up or down, are flat."""
KINDS = {"standard": "gpt2", "muP": "mup"}
"""Parametrizations by the name of their `init`."""

EXAMPLE = "\"{type: mup, base: {dim: 64, 'layers.ffn.hidden_dim': 192}}\""

Sizes = dict[str, list[float]]
"""Of each part the mean |x| at the start, and after each step the mean |change of x since|."""


class Measured(NamedTuple):
    """All sizes of one parametrization, a value for each width, in their order."""

    widths: tuple[int, ...]
    sizes: list[Sizes]

    def line(self, part: str, step: int) -> list[float]:
        """Over the widths; step 0 is the start."""
        return [of_width[part][step] for of_width in self.sizes]

    def slope(self, part: str, step: int) -> float:
        """The power of the width by which a size grows (least squares of the logarithms); NaN where one is none."""
        line = self.line(part, step)
        if not all(0 < size < math.inf for size in line):
            return math.nan
        xs, ys = [math.log(width) for width in self.widths], [math.log(size) for size in line]
        x, y = sum(xs) / len(xs), sum(ys) / len(ys)
        return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def coordinate_check(
    *recipe: str,
    widths: tuple[Positive, ...],
    output: str = "runs/coordinate_check.png",
    steps: Positive = 4,
    seeds: Positive = 2,
    **flags: Any,
) -> None:
    """See whether steps change a model by as much at every width, with muP and without.

    `coordinate_check recipes/sweeps/small.py --widths 64,128,256 --model.init
    "{type: mup, base: {dim: 64, 'layers.ffn.hidden_dim': 192}}"`: what the base names is widened with the model.
    Takes a few steps on one micro-batch of random tokens at each width, in this process, and draws how large
    activations are at the start, and how much each step has changed them, with the recipe's learning rate. Any further
    flag is one of the recipe.

    --widths N,N,...      values of model.dim
    --output FILE         the picture
    --steps N             at each width; logits behind a projection that stays narrow become flat after 20 or so
    --seeds N             that the sizes are averaged over
    """
    if len(recipe) != 1:
        raise UserError("give one recipe, as `coordinate_check recipes/sweeps/small.py --widths 64,128,256`")
    if len(set(widths)) < 2:
        raise UserError(f"--widths {','.join(map(str, widths))}: give two at least, they are what is compared")
    run = with_flags(load_recipe(str(recipe[0])), flags)
    if not isinstance(run.model.init, MuP):
        raise UserError(f"the recipe does not say what widens with the model; give its base, as --model.init {EXAMPLE}")
    check_output_file(output)
    runs = {kind: [at_width(run, width, init) for width in widths] for kind, init in KINDS.items()}
    found = {
        kind: Measured(widths, [average([measure(one, seed, steps) for seed in range(seeds)]) for one in of_kind])
        for kind, of_kind in runs.items()
    }
    draw(found, Path(output))
    print(table(found, steps), verdict(found["muP"], steps), output, sep="\n")


def at_width(run: Run, width: int, init: str) -> Run:
    """The run with all that its base names as many times as large as `dim` is then. UserError where it cannot be."""
    assert isinstance(run.model.init, MuP)
    base = run.model.init.base
    if "dim" not in base:
        raise UserError("model.init.base does not name dim, which --widths are values of")
    if broken := [path for path, value in base.items() if value * width % base["dim"]]:
        part = f"{broken[0]} is {base[broken[0]]} at a width of {base['dim']}"
        raise UserError(f"--widths {width}: {part}, which cannot be scaled to a whole number")
    fields = {f"model.{path}": value * width // base["dim"] for path, value in base.items()}
    with named_run(f"of width {width}"):
        widened = override(run, fields)
        widened.model.width_factors()  # refuses a base that does not fit
        return override(widened, {"model.init": init})


def measure(run: Run, seed: int, steps: int) -> Sizes:
    """The sizes of a run's model in its first steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = run.model.build_initialized(seed, device).eval()  # without dropout, which would be part of the changes
    optimizer = run.optimizer.build(run.optimizer.groups(model, run.model.width_factors()))
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(run.model.vocab_size, (run.micro_batch_size, run.seq_len + 1), generator=generator).to(
        device
    )
    start = activations(model, tokens_BT[:, :-1])
    sizes = {part: [mean_size(values)] for part, values in start.items()}
    for _ in range(steps):
        take_step(run, model, optimizer, tokens_BT)
        for part, values in activations(model, tokens_BT[:, :-1]).items():
            sizes[part].append(mean_size([now - then for now, then in zip(values, start[part], strict=True)]))
    return sizes


def take_step(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, tokens_BT: Tensor) -> None:
    """One update at the run's learning rate."""
    parts = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
    (parts.cross_entropy_sum / tokens_BT[:, 1:].numel() + parts.auxiliary).backward()
    if run.optimizer.max_grad_norm:
        nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = run.optimizer.learning_rate * group["rate"]
    optimizer.step()
    optimizer.zero_grad()
    for layer in model.modules():
        if isinstance(layer, MixtureOfExperts):
            layer.end_step(None)


@torch.no_grad()
def activations(model: nn.Module, tokens_BT: Tensor) -> dict[str, list[Tensor]]:
    """What each kind of part gives, a tensor for each layer that has it."""
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    watched: list[tuple[str, Any]] = [("embedding", model.position)]
    for block in model.get_submodule("layers").children():
        watched += [("attention", block.attention), ("ffn", block.ffn)]

    def note(part: str) -> Any:
        return lambda _module, _inputs, out: found[part].append(out[0] if isinstance(out, tuple) else out)

    handles = [module.register_forward_hook(note(part)) for part, module in watched]
    found["logits"].append(model(tokens_BT))
    for handle in handles:
        handle.remove()
    return found


def mean_size(tensors: Sequence[Tensor]) -> float:
    """Mean |x| of all elements, every tensor counting as much."""
    return torch.stack([tensor.float().abs().mean() for tensor in tensors]).mean().item()


def average(of_seeds: Sequence[Sizes]) -> Sizes:
    """The mean over seeds."""
    return {
        part: [sum(values) / len(values) for values in zip(*(sizes[part] for sizes in of_seeds), strict=True)]
        for part in PARTS
    }


def table(found: Mapping[str, Measured], steps: int) -> str:
    """The slopes of all parts."""
    columns = [(kind, step) for kind in found for step in (0, steps)]
    titles = [f"{kind} {'change' if step else 'start'}" for kind, step in columns]
    rows = [("~ width^", [f"{title:>18}" for title in titles])]
    rows += [(part, [f"{found[kind].slope(part, step):>+18.2f}" for kind, step in columns]) for part in PARTS]
    return "\n".join(f"{name:<12}{''.join(cells)}" for name, cells in rows)


def verdict(measured: Measured, steps: int) -> str:
    """Whether changes are as large at every width and nothing grows with it from the start."""
    wrong = list(_steep(measured, steps))
    if not wrong:
        return f"muP: after {steps} steps all changes are flat (slopes within {FLAT}), and nothing starts larger"
    return "muP: not flat: " + ", ".join(wrong)


def _steep(measured: Measured, steps: int) -> Iterator[str]:
    for part in PARTS:
        change, start = measured.slope(part, steps), measured.slope(part, 0)
        if not abs(change) <= FLAT:  # also NaN
            yield f"the change of {part} goes with width^{change:.2f}"
        if not start <= FLAT:
            yield f"{part} starts with width^{start:.2f}"


def draw(found: Mapping[str, Measured], path: Path) -> None:
    """A row of panels for each part, a column for each parametrization; a row has one scale."""
    figure, rows = pyplot.subplots(
        len(PARTS), len(found), figsize=(9, 11), layout="constrained", sharex=True, sharey="row", squeeze=False
    )
    for part, row in zip(PARTS, rows, strict=True):
        for (kind, measured), axes in zip(found.items(), row, strict=True):
            steps = len(measured.sizes[0][part]) - 1
            axes.plot(measured.widths, measured.line(part, 0), "--", color="#777777", label="size at the start")
            for step in range(1, steps + 1):
                colour = pyplot.get_cmap("viridis")(0.9 * (1 - step / steps))
                label = f"change after step {step}"
                axes.plot(measured.widths, measured.line(part, step), "o-", color=colour, markersize=3, label=label)
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(measured.widths, [str(width) for width in measured.widths])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.set_title(f"{kind}: {part}, ~ width^{measured.slope(part, steps):+.2f}", fontsize="medium")
        row[0].set_ylabel("mean |x|")
    for axes in rows[-1]:
        axes.set_xlabel("width (model.dim)")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    publish(figure, path)
