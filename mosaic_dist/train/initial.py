"""Starting weights: a folder whose model is the run's. What can be wrong with it is told before any rank starts.

Each rank then hashes its share of the files, and reads only what it holds, a tensor at a time.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mosaic_dist.checkpoint import candidates, refuse_foreign
from mosaic_dist.convert.hugging_face import import_folder
from mosaic_dist.convert.hugging_face.canonical_form import canonical_form
from mosaic_dist.convert.hugging_face.rules import check_names
from mosaic_dist.convert.native import FORMAT_VERSION, expected_shapes
from mosaic_dist.convert.reading import open_safetensors, prove_files, read_checksums, read_json, read_weight_map
from mosaic_dist.convert.writing import CHECKSUMS
from mosaic_dist.data.mixture import Corpus
from mosaic_dist.data.tokenizer import FILE_NAME, Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.model import GroupedLinear, Transformer
from mosaic_dist.parallel import World, gather_problems
from mosaic_dist.run_spec import Run, listing
from mosaic_dist.spec import at, leaves

MAY_DIFFER = {
    "aux_loss_scope",
    "aux_loss_coef",
    "capacity_factor",
    "chunk",
    "expert_bias_update_rate",
    "drop_policy",
    "dropout",
    "init",
    "jitter",
    "kernel",
    "max_seq_len",
    "z_loss_coef",
}
"""Fields of a model, with what is below them, that say how it is trained or computed, and not which function of its
weights it is. A learned table of positions tells its context by its shape."""


HINT = "; give a folder made by `python -m mosaic_dist export` or `import`, or one that transformers saved"
"""Of a message about an --init_from that cannot be read."""


class InitialWeights(Protocol):
    """An opened folder: its model, and its tensors under our names."""

    path: Path
    model: Transformer

    def verify(self, rank: int, world_size: int) -> None:
        """Prove this rank's share of the files; UserError for what is not as it was written."""

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Every tensor by name, in a form that gives the rows that it is sliced for."""


def open_initial(run: Run, info: Corpus, checkpoints: Path) -> InitialWeights | None:
    """The weights that `run` starts from; None where it starts from its seed, or goes on from a checkpoint.

    Reads descriptions and headers only. UserError for a folder of another model or tokenizer, and for tensors that are
    missing, left over, or of another shape.
    """
    if not run.init_from or candidates(checkpoints):
        return None
    path = Path(run.init_from).expanduser()
    refuse_foreign(path)
    config = read_json(path / "config.json", HINT)
    weights = ExportedWeights(path, config) if config.get("model_type") == "mosaic_dist" else HuggingFaceWeights(path)
    check_same_model(weights.model, run.model, path)
    if (path / FILE_NAME).exists():
        found = Tokenizer.load(path)
        if found.digest != info.tokenizer and not found.has_ids_of(Tokenizer.load(info.tokenizer_path)):
            raise UserError(
                f"the data of {info.path} was made with tokenizer {info.tokenizer}, and {path} holds {found.digest}: "
                f"its weights know other tokens; tokenize the data with {path / FILE_NAME}"
            )
    return weights


class ExportedWeights:
    """An exported model of ours: rows of a tensor are read without the others, and files have checksums."""

    def __init__(self, path: Path, config: dict[str, Any]):
        if config.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {config.get('format_version')!r}, this version of mosaic_dist reads "
                f"{FORMAT_VERSION}; export it again"
            )
        if config.get("ternary") == "packed":
            raise UserError(
                f"{path} holds packed ternary matrices, without the weights that training goes on with; export the run "
                "with --ternary float"
            )
        with at(f"{path / 'config.json'}: model"):
            self.model = Transformer.from_dict(config.get("model", {}))
        if read_checksums(path) is None:
            raise UserError(f"{path} has no {CHECKSUMS}, so its weights cannot be proven; export it again")
        self.path, self.files = path, read_weight_map(path)
        shapes = expected_shapes(self.model)
        check_names(shapes, self.files)
        for name, part in self.tensors():
            if (found := tuple(part.get_shape())) != shapes[name]:
                raise UserError(f"{name} is {found} in {path / self.files[name]}, {shapes[name]} in its model")

    def verify(self, rank: int, world_size: int) -> None:
        """Prove the files of this rank's share by their checksums."""
        prove_files(self.path, rank, world_size)

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Name and tensor of each weight in the model's own form; one file is open at a time."""
        for file in sorted(set(self.files.values())):
            with open_safetensors(self.path / file) as opened:
                for name in (name for name, place in self.files.items() if place == file):
                    yield name, opened.get_slice(name)


class HuggingFaceWeights:
    """A folder of transformers' form. Each rank reads whole tensors, at most a layer's experts of one matrix at once.

    Shapes are checked as tensors are read. Of a very large model, `python -m mosaic_dist import` makes a folder whose
    experts are read in part.
    """

    def __init__(self, path: Path):
        self.path = path
        self.model, self._tensors = import_folder(path, prove=False)

    def verify(self, rank: int, world_size: int) -> None:
        """Prove the files of this rank's share. Only folders that `export --format hf` wrote have checksums."""
        prove_files(self.path, rank, world_size)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each weight, converted. To be called once."""
        return self._tensors


def check_same_model(there: Transformer, here: Transformer, path: Path) -> None:
    """UserError that tells where the model of the folder `path` is another function, or of another shape."""
    # without other differences, shapes can tell a field of MAY_DIFFER
    found = _differing(_function(there), _function(here)) or _differing(expected_shapes(there), expected_shapes(here))
    if found:
        raise UserError(
            f"{path} holds another model; change these fields of the run, or give another --init_from.{listing(found)}"
        )


def _function(model: Transformer) -> dict[str, Any]:
    told = leaves(canonical_form(model))
    fields = {path: value for path, value in told if MAY_DIFFER.isdisjoint(path.split("."))}
    return fields | {"layers": f"{len(model.layers)} layers"}


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [
        f"model.{key}: {there.get(key, 'nothing')!r} there, {here.get(key, 'nothing')!r} here"
        for key in {**there, **here}
        if not _same(there.get(key), here.get(key))
    ]


def _same(one: Any, other: Any) -> bool:
    """Equal, or floats that differ by the rounding of the arithmetic that made them."""
    both_floats = isinstance(one, float) and isinstance(other, float)
    return math.isclose(one, other, rel_tol=1e-9) if both_floats else bool(one == other)


def verify_together(weights: InitialWeights, world: World) -> None:
    """Prove all files, each rank its share. Every rank must call; UserError on all of them for what one has found."""
    problem = None
    try:
        weights.verify(world.rank, world.size)
    except UserError as error:
        problem = str(error)
    if problems := gather_problems(problem):
        raise UserError(problems[0])


@torch.no_grad()
def fill(model: nn.Module, weights: InitialWeights) -> None:
    """Give a model of this rank's experts, with storage, its parameters and buffers. Stored values are cast to theirs.

    UserError for what cannot be read.
    """
    first_rows = {
        f"{module_name}.{name}": module.first_expert
        for module_name, module in model.named_modules()
        if isinstance(module, GroupedLinear)
        for name, _ in module.named_parameters(recurse=False)
    }
    waiting = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, stored in weights.tensors():
        target, first = waiting.pop(name), first_rows.get(name, 0)
        target.copy_(stored[first : first + len(target)])
    assert not waiting, f"open_initial let a folder pass without {sorted(waiting)}"
