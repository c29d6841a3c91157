"""Proof that checkpoints and exported models are whole: every byte, every tensor."""

import functools
from pathlib import Path

from mosaic_dist.checkpoint import Checkpoint, CheckpointError, candidates
from mosaic_dist.checkpoint.audit import Check, checks_of, failed, run_checks
from mosaic_dist.checkpoint.rank_file import DTYPE_NAMES
from mosaic_dist.convert.hugging_face import import_folder
from mosaic_dist.convert.locate import Located
from mosaic_dist.convert.native import check_complete, expected_shapes, planned_tensors
from mosaic_dist.convert.reading import open_safetensors, prove_file, read_checksums, read_json, read_weight_map
from mosaic_dist.convert.writing import CHECKSUMS
from mosaic_dist.errors import UserError
from mosaic_dist.model import Transformer
from mosaic_dist.spec import at, recipe_asked_for


def verify(found: Located, model: Transformer | None, threads: int) -> list[Path]:
    """Read and prove everything in a folder; the checkpoints, or the exported model, that are whole.

    `model` is that of the run where one is known: checkpoints must have its tensors. UserError names each damaged file,
    what is wrong with it, and which other checkpoint is good.
    """
    if found.kind == "model":
        problems = run_checks(model_checks(found.path), threads)
    else:
        problems = run_checks([check for one in _all(found) for check in run_checkpoint(one, model)], threads)
    good = [one for one, told in problems.items() if not told]
    if len(good) == len(problems):
        return good
    told = "\n  ".join(text for texts in problems.values() for text in sorted(texts))
    way_out = "export it again" if found.kind == "model" else _good_one(found, good, model, threads)
    raise UserError(f"{len(problems) - len(good)} of {len(problems)} not whole:\n  {told}\n{way_out}")


def _all(found: Located) -> list[Path]:
    checkpoints = found.checkpoints()
    if not checkpoints:
        raise UserError(f"{found.path} has no checkpoint yet; nothing was verified")
    return checkpoints


def run_checkpoint(directory: Path, model: Transformer | None) -> list[Check]:
    """Checks of one checkpoint, also that its tensors are those of the model."""

    def prove() -> None:
        try:
            if model is not None:
                check_complete(expected_shapes(model), Checkpoint.open(directory).shapes)
        except UserError as error:
            raise UserError(f"{directory}: {error}") from None

    checks = checks_of(directory)
    return checks if len(checks) == 1 else [Check(directory, 0, prove), *checks]


def _good_one(found: Located, good: list[Path], model: Transformer | None, threads: int) -> str:
    """The newest checkpoint that is good, in words. For a single damaged one, its neighbours are read."""
    here = found.path.absolute()
    neighbours = candidates(here.parent).values() if found.kind == "checkpoint" else ()
    for other in reversed(neighbours):
        if not good and other != here and not any(run_checks(run_checkpoint(other, model), threads).values()):
            good = [other]
    return f"{good[-1]} is good" if good else "no checkpoint is good"


# --- exported models ----------------------------------------------------------------------------------------------


def model_checks(folder: Path) -> list[Check]:
    """Checks of an exported model in either form. One without checksums cannot be proven, and that is a problem too."""
    try:
        listed = read_checksums(folder)
    except UserError as error:
        return [failed(folder, str(error))]
    if listed is None:
        return [failed(folder, f"{folder} has no {CHECKSUMS}, so nothing can be proven; only exports of ours have one")]
    checks = [
        Check(folder, written.size_bytes, functools.partial(prove_file, folder / name, written))
        for name, written in listed.items()
    ]
    return [Check(folder, 0, functools.partial(_check_tensors, folder)), *checks]


def _check_tensors(folder: Path) -> None:
    """Every tensor of the model is there, in its shape."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != "mosaic_dist":
        import_folder(folder, prove=False)  # checks names against the configuration
        return
    with recipe_asked_for(), at(f"{folder / 'config.json'}: model"):
        model = Transformer.from_dict(config.get("model", {}))
    expected = planned_tensors(model, config["dtype"], config.get("ternary", "float"))
    wanted = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in expected}
    differing = sorted(name for name, _ in wanted.items() ^ read_headers(folder).items())
    if differing:
        raise CheckpointError(f"{folder}: tensors are missing, left over or of another shape: {differing[:5]}")


def read_headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a folder in safetensors form, from its files' headers."""
    found = {}
    for file in sorted(set(read_weight_map(folder).values())):
        with open_safetensors(folder / file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found
