"""Which files of a model's folder count: those that its own lists name. Others are refused, never chosen by name.

Copying one model over another (`rsync`, `cp -r`) leaves the files of both in one folder, and each of them is whole. So
the tensors come from the files that the index names, or from model.safetensors where there is no index; in an exported
model checksums.json lists every file. A file that is read elsewhere and is on no list belongs to another model.
"""

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from mosaic_dist.convert.writing import CHECKSUMS, INDEX, WEIGHTS
from mosaic_dist.errors import UserError
from mosaic_dist.files import checksum

READ = ("config.json", INDEX, "*.safetensors", "tokenizer.json", "tokenizer.model", "*.py")
"""Names that a reader of models takes from a folder."""
SECOND_COPY = "consolidated*.safetensors"
"""The same weights under their author's names, which some released repositories hold as well. Nobody reads them."""


class Written(NamedTuple):
    """What checksums.json says of a file."""

    size_bytes: int
    xxh3_128: str


def read_json(file: Path, hint: str = "") -> dict[str, Any]:
    """A mapping from a JSON file. UserError for anything else; `hint` ends the message about an unreadable file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}){hint}") from None
    except ValueError as error:  # neither JSON nor text
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds {type(content).__name__}, not a mapping")
    return content


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """An opened safetensors file. UserError if it is missing or damaged, also for what is read from it inside."""
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is missing or damaged: {error}") from None


def read_checksums(folder: Path) -> dict[str, Written] | None:
    """The files that an exported model consists of; None for a folder without checksums.json, from elsewhere.

    UserError if checksums.json is damaged, or does not list a file in the folder that would be read.
    """
    if not (folder / CHECKSUMS).exists():
        return None
    try:
        rows = read_json(folder / CHECKSUMS).items()
        listed = {name: Written(int(row["bytes"]), str(row["xxh3_128"])) for name, row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / CHECKSUMS} is damaged ({error}); export the model again") from None
    _refuse_leftovers(folder, READ, listed, CHECKSUMS)
    return listed


def read_weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor. UserError if the folder has no weights in safetensors form, or leftovers of others."""
    read_checksums(folder)
    if (folder / INDEX).exists():
        files = read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise UserError(f"{folder / INDEX} has no weight_map from tensors to files")
    elif (folder / WEIGHTS).exists():
        with open_safetensors(folder / WEIGHTS) as opened:
            files = dict.fromkeys(opened.keys(), WEIGHTS)
    else:
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}; save the model with safe_serialization=True")
    _refuse_leftovers(folder, ("*.safetensors",), set(files.values()), INDEX)
    return files


def _refuse_leftovers(folder: Path, patterns: Collection[str], listed: Collection[str], source: str) -> None:
    """UserError that names the files of these patterns that `source` does not list."""
    found = {file.name for pattern in patterns for file in folder.glob(pattern)}
    found -= {file.name for file in folder.glob(SECOND_COPY)}
    if leftovers := sorted(found.difference(listed)):
        reason = f"{source} does not list" if (folder / source).exists() else f"there is no {source} that lists"
        raise UserError(
            f"{folder}: {reason} {', '.join(leftovers)}, so more than one model was copied into this folder; copy each "
            "into a folder of its own, or remove the files that belong to the other"
        )


def prove_file(file: Path, written: Written) -> None:
    """UserError unless a file is there with its checksum."""
    if not file.is_file():
        raise UserError(f"{file} is missing; {written.size_bytes} bytes were written")
    if (digest := checksum(file)) != written.xxh3_128:
        raise UserError(
            f"{file} is damaged, or was changed after the export: its {file.stat().st_size} bytes have xxh3-128 "
            f"{digest}, and {written.size_bytes} bytes with {written.xxh3_128} were written; export the model again"
        )


def prove_files(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Hash this rank's share of an exported model's files. UserError for the first that is not as it was written.

    Folders from elsewhere have no checksums, and pass.
    """
    listed = read_checksums(folder) or {}
    for name in sorted(listed)[rank::world_size]:
        prove_file(folder / name, listed[name])
